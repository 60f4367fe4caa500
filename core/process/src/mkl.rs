//! Which of its kernels MKL takes. Products of float32 are its own in a libtorch for x86-64.

use std::ffi::c_int;

/// Whether the processor is one of Intel's. MKL asks this before it takes its kernels for AVX-512, so that products on AMD's
/// take longer than they need to: twice as long on Zen 5, a quarter longer on Zen 4. It asks a function of this name; a
/// program's own stands before that of the library, and says yes where the instructions are there. It is what PyTorch's
/// maintainers advise to preload on such a processor (<https://github.com/pytorch/builder/pull/1245>). A library that does not
/// ask it is as it was.
///
/// Every program that links this crate has it.
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
    fn it_stands_before_that_of_the_library() {
        // SAFETY: the name is a string of C.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"mkl_serv_intel_cpu_true".as_ptr()) };
        let ours: extern "C" fn() -> c_int = mkl_serv_intel_cpu_true;
        assert!(std::ptr::eq(found, ours as *mut _) || !tch::utils::has_mkl());
    }
}
