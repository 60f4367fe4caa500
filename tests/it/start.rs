//! What happens before `main`.

use std::fs;
use std::process::Command;

use crate::common::Desk;

/// The libraries in a folder on the loader's path that bear the names of libtorch's and hold nothing of it.
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
