//! Memory that the allocator holds back: malloc_trim(3).

/// Gives the kernel what was freed. After something large only: it goes through all that the allocator has.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time, by any thread.
    let _whether_anything_was = unsafe { libc::malloc_trim(0) };
}
