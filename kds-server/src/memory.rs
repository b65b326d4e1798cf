//! Nothing secret stays in this process's memory longer than it is used (design §7, *One place in memory*).
//!
//! Whoever holds a secret holds a pointer to the one place where it is, and zeroizes it (`SecretBytes`). What others make
//! of it on the way (TLS, encoders, vectors that grow, channels) is covered here, in one place for everything:
//!
//! - **Heap**: the allocator overwrites whatever is freed.
//! - **Stacks**: calculations leave copies in frames that are over. A worker overwrites what is below it before it sleeps; other
//!   threads do so after their piece of work ([`scrubbed`]).
//! - **Disk**: no core dumps, no other process of this user reads this memory, and nothing is swapped out, as far as the
//!   system allows ([`protect`]).

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use std::alloc::System;
use std::hint::black_box;
use zeroize::Zeroize as _;
use zeroizing_alloc::ZeroAlloc;

#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

/// Bytes of a stack that are overwritten: several times what the deepest calculation on secrets uses.
const DEPTH: usize = 128 * 1024;

/// Keeps this process's memory from others and from disks. What the system does not allow is said.
pub fn protect() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) =
        setrlimit(Resource::Core, none).and_then(|()| set_dumpable_behavior(DumpableBehavior::NotDumpable))
    {
        tracing::warn!(%error, "core dumps of this process cannot be switched off");
    }
    // With a limit, locking everything would let allocations fail some day.
    let unlimited = getrlimit(Resource::Memlock).current.is_none();
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if !unlimited || mlockall(all).is_err() {
        tracing::info!(
            "memory is not locked: use no swap, encrypt it, or lift the limit (LimitMEMLOCK=infinity)"
        );
    }
}

/// Does something with secrets, and leaves nothing of them on this thread's stack.
pub fn scrubbed<T>(work: impl FnOnce() -> T) -> T {
    let done = work();
    scrub_stack();
    done
}

/// Overwrites what calls that are over have left on this thread's stack.
#[inline(never)]
fn scrub_stack() {
    let mut dead = [0u8; DEPTH];
    dead.zeroize();
    black_box(&dead);
}

/// What servers and signers run in: its workers leave nothing on their stacks when they sleep.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().on_thread_park(scrub_stack).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts bytes into a frame that is over when it returns, deeper than the test itself goes; says where they were.
    #[inline(never)]
    fn leave_behind(byte: u8) -> usize {
        let secrets = [byte; DEPTH / 2];
        black_box(&secrets).as_ptr() as usize
    }

    fn holds(at: usize, secret: &[u8]) -> bool {
        // By the system, since dead memory is nobody's to read.
        use std::os::unix::fs::FileExt as _;
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        let mut found = vec![0; secret.len()];
        memory.read_exact_at(&mut found, at as u64).is_ok() && found == secret
    }

    #[test]
    fn neither_stacks_nor_what_was_freed_keep_secrets() {
        let at = leave_behind(0xa7);
        assert!(holds(at, &[0xa7; 64]), "the test leaves nothing behind");
        let at = scrubbed(|| leave_behind(0xa7));
        assert!(!holds(at, &[0xa7; 64]));

        // A vector that grows moves. What comes behind it keeps its old place from being given back at once.
        let mut grows = black_box(vec![0x5cu8; 4096]);
        let behind = black_box(vec![0u8; 4096]);
        let before = grows.as_ptr() as usize;
        grows.reserve_exact(1 << 16);
        assert_ne!(before, grows.as_ptr() as usize);
        assert!(!holds(before + 3000, &[0x5c; 64]));
        drop(behind);
    }
}
