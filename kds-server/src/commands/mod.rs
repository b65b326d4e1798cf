//! The command line, a file for each command.

pub mod demo;
pub mod dev;
pub mod guard;
pub mod init;
pub mod new_identity;
pub mod plan;
pub mod processes;
pub mod run;
pub mod signer;
