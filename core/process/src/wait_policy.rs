//! Shortens the time for which libtorch's threads spin while they wait for work.
//!
//! libtorch runs on GNU OpenMP, whose threads spin for about 3 ms before they sleep. Next to another busy process,
//! spinning takes the cores that the work needs: a step can take three times as long. OpenMP reads its settings when
//! the dynamic loader initialises it, before `main`, so a program can only set them by restarting itself. The loader
//! calls the functions in `.preinit_array` before it initialises any library, so the restart costs only a few
//! milliseconds.

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

/// Number of spins before a waiting thread sleeps: about 10 microseconds instead of 3 milliseconds.
const SETTING: &CStr = c"GOMP_SPINCOUNT=1000";
/// Variables by which the user chooses; they are kept.
const CHOICES: [&[u8]; 2] = [b"GOMP_SPINCOUNT=", b"OMP_WAIT_POLICY="];
/// Larger environments are left unchanged.
const MOST_VARIABLES: usize = 4096;

#[used]
#[unsafe(link_section = ".preinit_array")]
static BEFORE_LIBRARIES: extern "C" fn(c_int, *const *const c_char, *const *const c_char) = set;

/// Restarts the program with [`SETTING`], unless the user chose a setting. Changes nothing if that fails. No library is
/// initialised yet, so this neither allocates nor uses Rust's runtime.
extern "C" fn set(_count: c_int, arguments: *const *const c_char, environment: *const *const c_char) {
    let mut variables = [ptr::null(); MOST_VARIABLES + 2];
    // SAFETY: the loader passes arrays of C strings that end with a null pointer and live as long as the process.
    unsafe {
        // Skip setuid programs, and programs run as an argument of the loader: /proc/self/exe is then the loader.
        if libc::getauxval(libc::AT_SECURE) != 0 || libc::getauxval(libc::AT_BASE) == 0 {
            return;
        }
        let mut count = 0;
        loop {
            let variable = *environment.add(count);
            if variable.is_null() {
                break;
            }
            let text = CStr::from_ptr(variable).to_bytes();
            if count == MOST_VARIABLES || CHOICES.iter().any(|name| text.starts_with(name)) {
                return;
            }
            variables[count] = variable;
            count += 1;
        }
        variables[count] = SETTING.as_ptr();
        libc::execve(c"/proc/self/exe".as_ptr(), arguments, variables.as_ptr());
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    /// Returns the output of `shows_the_setting` in a new process of this binary with `variables`, which runs `set`.
    fn seen(variables: &[(&str, &str)]) -> String {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "wait_policy::tests::shows_the_setting", "--nocapture", "--include-ignored"]);
        command.env_remove("GOMP_SPINCOUNT").env_remove("OMP_WAIT_POLICY").envs(variables.iter().copied());
        let output = command.output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    #[ignore = "started by the tests below"]
    fn shows_the_setting() {
        println!("spins: {:?}", std::env::var("GOMP_SPINCOUNT").ok());
    }

    #[test]
    fn spin_count_is_set_by_default() {
        assert!(seen(&[]).contains("spins: Some(\"1000\")"));
    }

    #[test]
    fn the_users_setting_is_kept() {
        assert!(seen(&[("GOMP_SPINCOUNT", "7")]).contains("spins: Some(\"7\")"));
        assert!(seen(&[("OMP_WAIT_POLICY", "active")]).contains("spins: None"));
    }
}
