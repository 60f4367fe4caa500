//! Process-wide settings that make training fast. Link this crate into a program, never into a library: it replaces
//! `malloc`, overrides the function by which MKL recognises Intel CPUs, and restarts the program to set an OpenMP
//! variable.
//!
//! ```ignore
//! use dictlearn_process as _;
//!
//! fn main() -> std::process::ExitCode {
//!     dictlearn::cli::main()
//! }
//! ```

/// Replaces the allocator, also for libtorch. glibc returns large blocks to the system, and touching fresh pages costs
/// more than most computations on them. Its aligned blocks also do not fit into the holes that equal ones left.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod allocator {
    use tikv_jemallocator as _;

    /// jemalloc reads its settings under this name. It keeps freed memory, has no separate arena for large blocks, and
    /// cuts small blocks from free ones of any size (up to 2³⁰ times as large). The default limit of 2⁶ makes it map
    /// fresh pages instead: a run of `top_k` then grows by 2 MB a step.
    #[used]
    #[unsafe(export_name = "malloc_conf")]
    static SETTINGS: Option<&'static u8> =
        Some(&b"dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0,lg_extent_max_active_fit:30\0"[0]);
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod mkl;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod wait_policy;
