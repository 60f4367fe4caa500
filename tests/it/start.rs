//! Settings that take effect before `main`.

use std::fs;
use std::process::Command;

use crate::common::Desk;

/// The foreign folder holds empty libraries with libtorch's file names.
#[test]
fn a_foreign_libtorch_in_ld_library_path_is_not_loaded() {
    let desk = Desk::new();
    let source = desk.write("empty.c", "int nothing_of_libtorch(void) { return 0; }\n");
    fs::create_dir(desk.path("foreign")).unwrap();
    for name in ["libtorch.so", "libtorch_cpu.so", "libc10.so", "libgomp.so.1"] {
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", &format!("-Wl,-soname,{name}"), "-o"]).arg(desk.path("foreign").join(name));
        assert!(compiler.arg(&source).status().unwrap().success());
    }
    let output = desk.program().arg("list").env("LD_LIBRARY_PATH", desk.path("foreign")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("top_k"));
}

/// `dictlearn_process` is linked only for its side effects, so no other test fails without it.
#[test]
fn the_program_links_its_allocator_mkl_and_openmp_settings() {
    let program = fs::read(env!("CARGO_BIN_EXE_dictlearn")).unwrap();
    for part in ["mkl_serv_intel_cpu_true", "lg_extent_max_active_fit:30", "GOMP_SPINCOUNT=1000"] {
        let found = program.windows(part.len()).any(|window| window == part.as_bytes());
        assert!(found || !cfg!(all(target_os = "linux", target_env = "gnu", target_arch = "x86_64")), "{part}");
    }
}
