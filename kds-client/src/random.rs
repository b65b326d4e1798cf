//! Randomness that becomes secret.

use quorum::SecretBytes;
use rand::Rng as _;
use rand::rand_core::UnwrapErr;
use rand::rngs::SysRng;

/// The system's, asked each time. A generator of this process's own is faster, and has what it gave last in its buffer
/// until it needs the next: for others to read.
pub fn system() -> UnwrapErr<SysRng> {
    UnwrapErr(SysRng)
}

/// 32 bytes of it.
pub fn secret() -> SecretBytes {
    SecretBytes::fill(|bytes| system().fill_bytes(bytes))
}
