//! Settings of a whole process that make training fast. Link it into a program, never into a library: it replaces the process's
//! `malloc`, answers a question of MKL's, and starts the program again with another environment.
//!
//! ```ignore
//! use dictlearn_process as _;
//!
//! fn main() -> std::process::ExitCode {
//!     dictlearn::cli::main()
//! }
//! ```

/// The allocator, libtorch's too. glibc returns large blocks to the system, and touching fresh pages costs more than most of
/// what is computed on them; and its aligned blocks do not fit into the holes that equal ones left.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod allocator {
    use tikv_jemallocator as _;

    /// jemalloc's settings, read by it under this name: freed memory is kept, large blocks are not treated apart, and small ones
    /// are cut from free ones of any size (2³⁰ times as large). By default they are not if a free one is more than 2⁶ times as
    /// large; then they lie on fresh pages, step after step, and a run of `top_k` takes 2 MB more with each.
    #[used]
    #[unsafe(export_name = "malloc_conf")]
    static SETTINGS: Option<&'static u8> =
        Some(&b"dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0,lg_extent_max_active_fit:30\0"[0]);
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod mkl;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod wait_policy;
