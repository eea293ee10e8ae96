//! How the C library keeps free memory: mallopt(3), `malloc_trim(3)`.

/// Makes it give back what is free, rather than keep it for a speed that a supervisor has no use for: one heap for all
/// threads, and no growing threshold from which on large pieces come from the heap. To be called before the first thread.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (option, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, 64 * 1024), (libc::M_TRIM_THRESHOLD, 64 * 1024)]
    {
        // SAFETY: sets a number of the allocator, which is valid at any time; nothing else changes them.
        let _works_without = unsafe { libc::mallopt(option, value) };
    }
}

/// Gives the kernel what was freed. After something large only: it goes through all that the allocator has.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time, by any thread.
    let _whether_anything_was = unsafe { libc::malloc_trim(0) };
}
