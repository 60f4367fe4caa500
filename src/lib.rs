//! dictlearn with every bundled plugin linked in.
//!
//! A binary of your own that adds a plugin needs this crate and yours:
//! `use {dictlearn as _, my_plugin as _};`, then [`crate::cli::main`].

/// The allocator, libtorch's too. glibc's hands large blocks back to the system, and touching fresh pages costs more than
/// most of what is computed on them; and its aligned blocks do not fit into the holes that equal ones left.
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

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod wait_policy;

// The plugins are those of Cargo.toml: a line there is all that the program knows of each (see build.rs).
include!(concat!(env!("OUT_DIR"), "/plugins.rs"));

pub mod cli;
pub mod config;
pub mod contract;
mod doctor;
pub mod new_plugin;
mod publish;
pub mod run;
