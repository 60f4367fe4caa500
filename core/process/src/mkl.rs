//! Makes MKL use its AVX-512 kernels on AMD CPUs. On x86-64, libtorch computes float32 products with MKL.

use std::ffi::c_int;

/// Returns 1 if the processor is Intel's or has AVX-512.
///
/// MKL calls a function of this name and uses its AVX-512 kernels only on Intel CPUs. Without them, products on AMD
/// CPUs take twice as long (Zen 5) or a quarter longer (Zen 4). This definition overrides the library's in every
/// program that links this crate. PyTorch's maintainers advise preloading such a function
/// (<https://github.com/pytorch/builder/pull/1245>).
#[unsafe(no_mangle)]
extern "C" fn mkl_serv_intel_cpu_true() -> c_int {
    let vendor = std::arch::x86_64::__cpuid(0);
    let intel = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel";
    c_int::from(intel || dictlearn_core::machine::device::has_avx512())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_definition_overrides_the_librarys() {
        // SAFETY: the name is a C string.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"mkl_serv_intel_cpu_true".as_ptr()) };
        let ours: extern "C" fn() -> c_int = mkl_serv_intel_cpu_true;
        assert!(std::ptr::eq(found, ours as *mut _) || !tch::utils::has_mkl());
    }
}
