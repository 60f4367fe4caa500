//! Estimates the memory of a run and refuses runs that cannot fit, before anything is read or trained.

use std::fmt;

use sysinfo::{CGroupLimits, MemoryRefreshKind, RefreshKind, System};
use tch::Device;

use super::device;
use crate::error::InputError;

/// Memory that one part of a run takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Name of the part: `the buffer`.
    pub what: String,
    /// Upper bound in bytes.
    pub bytes: u64,
    /// Setting that reduces it: `n_ctxs`.
    pub knob: String,
    /// True if it is temporary: only the largest temporary part counts.
    pub passing: bool,
    /// True if it is in host memory, whatever the run's device.
    pub on_host: bool,
}

impl MemoryNeed {
    /// Creates a need on the run's device that lasts as long as the run.
    pub fn lasting(what: impl Into<String>, bytes: u64, knob: impl Into<String>) -> Self {
        MemoryNeed { what: what.into(), bytes, knob: knob.into(), passing: false, on_host: false }
    }

    /// Creates a temporary need on the run's device.
    pub fn passing(what: impl Into<String>, bytes: u64, knob: impl Into<String>) -> Self {
        MemoryNeed { passing: true, ..MemoryNeed::lasting(what, bytes, knob) }
    }

    /// Moves the need to host memory.
    pub fn on_host(self) -> Self {
        MemoryNeed { on_host: true, ..self }
    }
}

/// Bytes of libtorch and the program themselves.
const PROGRAM: u64 = 190_000_000;

/// Bytes of a CUDA context and its libraries on a GPU.
const CUDA: u64 = 600_000_000;

/// Memory that a run needs and the memory that is free.
#[derive(Debug, Clone)]
pub struct Plan {
    device: Device,
    /// Free bytes of host memory when the plan was created.
    free: u64,
    /// Free bytes of the GPU, if known.
    free_on_gpu: Option<u64>,
    needs: Vec<MemoryNeed>,
}

impl Plan {
    /// Creates the plan of a run on a device; call it before anything is allocated.
    pub fn new(device: Device) -> Self {
        let mut needs = vec![MemoryNeed::lasting("the program", PROGRAM, "").on_host()];
        if device.is_cuda() {
            needs.push(MemoryNeed::lasting("CUDA", CUDA, ""));
        }
        Plan { device, free: free(), free_on_gpu: free_on_gpu(device), needs }
    }

    /// Adds needs.
    ///
    /// # Errors
    /// Fails if the run does not fit into a device's free memory.
    pub fn add(&mut self, needs: impl IntoIterator<Item = MemoryNeed>) -> Result<(), InputError> {
        self.needs.extend(needs);
        for (device, free) in [(Device::Cpu, Some(self.free)), (self.device, self.free_on_gpu)] {
            let (Some(free), peak) = (free, self.peak(device)) else { continue };
            if peak <= free || (device != Device::Cpu && !device.is_cuda()) {
                continue;
            }
            let mut own: Vec<&MemoryNeed> = self.needs.iter().filter(|need| self.lies_on(need, device)).collect();
            own.sort_by_key(|need| std::cmp::Reverse(need.bytes));
            let most = own.iter().find(|need| !need.knob.is_empty());
            let help = most.map_or_else(String::new, |most| {
                format!("the largest part, {}, is {}: change {}", Size(most.bytes), most.what, most.knob)
            });
            return Err(InputError::new(format!(
                "the run needs {} of memory ({}), but only {} is free",
                Size(peak),
                device::name(device),
                Size(free)
            ))
            .help(help));
        }
        Ok(())
    }

    fn lies_on(&self, need: &MemoryNeed, device: Device) -> bool {
        device == if need.on_host { Device::Cpu } else { self.device }
    }

    /// Returns the peak on a device in bytes.
    fn peak(&self, device: Device) -> u64 {
        let own = || self.needs.iter().filter(|need| self.lies_on(need, device));
        let lasting = own().filter(|need| !need.passing).fold(0_u64, |sum, need| sum.saturating_add(need.bytes));
        let passing = own().filter(|need| need.passing).map(|need| need.bytes).max().unwrap_or(0);
        lasting.saturating_add(passing)
    }

    /// Returns one line per device with its expected peak.
    pub fn lines(&self) -> Vec<String> {
        let devices = [(self.device, self.free_on_gpu), (Device::Cpu, Some(self.free))];
        let used = if self.device == Device::Cpu { &devices[1..] } else { &devices[..] };
        let line = |(device, free): &(Device, Option<u64>)| {
            let free = free.map_or_else(String::new, |free| format!(" of {} free", Size(free)));
            format!("expected peak memory ({}): {}{free}", device::name(*device), Size(self.peak(*device)))
        };
        used.iter().map(line).collect()
    }

    /// Returns one line per need.
    pub fn parts(&self) -> Vec<String> {
        let part = |need: &MemoryNeed| {
            let passing = if need.passing { ", temporary" } else { "" };
            let place = if need.on_host { Device::Cpu } else { self.device };
            format!("  {}: {} ({}{passing})", need.what, Size(need.bytes), device::name(place))
        };
        self.needs.iter().map(part).collect()
    }
}

/// Displays bytes as MB or GB (powers of ten).
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = self.0 as f64 / 1e6;
        if megabytes < 1000.0 { write!(f, "{megabytes:.1} MB") } else { write!(f, "{:.1} GB", megabytes / 1000.0) }
    }
}

/// Fails if one need alone exceeds the free memory. Call it before allocating. The knob is a field of the component.
pub fn check(need: &MemoryNeed) -> Result<(), InputError> {
    let free = free();
    if need.bytes <= free {
        return Ok(());
    }
    let message = format!("{} would take {} of memory, but only {} is free", need.what, Size(need.bytes), Size(free));
    Err(InputError::new(message).field(need.knob.trim_matches('`')).help("reduce it"))
}

/// Returns the bytes of host memory that a process can allocate: free or reclaimable, within a container's limit.
pub fn free() -> u64 {
    let ram = RefreshKind::nothing().with_memory(MemoryRefreshKind::everything());
    let system = System::new_with_specifics(ram);
    let free = system.available_memory() + system.free_swap();
    free.min(system.cgroup_limits().map_or(u64::MAX, |limits| left_within(&limits)))
}

/// Returns the bytes that a cgroup's processes can still allocate. The page cache counts as free: the kernel charges it
/// to the cgroup but reclaims it under pressure. An unlimited cgroup reports a very large limit.
fn left_within(limits: &CGroupLimits) -> u64 {
    limits.total_memory.saturating_sub(limits.rss).saturating_add(limits.free_swap)
}

/// Returns the total host memory in bytes.
pub fn total() -> u64 {
    System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::everything())).total_memory()
}

/// Returns the free bytes of a GPU; `None` if CUDA cannot tell.
pub fn free_on_gpu(device: Device) -> Option<u64> {
    let Device::Cuda(index) = device else { return None };
    #[cfg(target_os = "linux")]
    {
        type Get = unsafe extern "C" fn(*mut i32) -> i32;
        type Set = unsafe extern "C" fn(i32) -> i32;
        type MemoryOf = unsafe extern "C" fn(*mut usize, *mut usize) -> i32;
        // SAFETY: the functions of the CUDA runtime that libtorch loaded have these types, and the arguments outlive
        // the calls. The thread's current device is restored.
        unsafe {
            let find = |name: &std::ffi::CStr| {
                let found = libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr());
                (!found.is_null()).then_some(found)
            };
            let get: Get = std::mem::transmute(find(c"cudaGetDevice")?);
            let set: Set = std::mem::transmute(find(c"cudaSetDevice")?);
            let memory_of: MemoryOf = std::mem::transmute(find(c"cudaMemGetInfo")?);
            let (mut before, mut free, mut total) = (0, 0, 0);
            if get(&mut before) != 0 || set(index as i32) != 0 {
                return None;
            }
            let found = memory_of(&mut free, &mut total);
            set(before);
            (found == 0).then_some(free as u64)
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = index;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_cache_counts_as_free() {
        let limits = CGroupLimits { total_memory: 24 << 30, free_memory: 3 << 30, free_swap: 1 << 30, rss: 4 << 30 };
        assert_eq!(left_within(&limits), 21 << 30);
        let none = CGroupLimits { total_memory: u64::MAX, free_memory: 0, free_swap: 1, rss: 0 };
        assert_eq!(left_within(&none), u64::MAX);
    }

    #[test]
    fn only_the_largest_temporary_need_counts_and_an_excess_is_refused() {
        let mut plan = Plan { device: Device::Cuda(0), free: 1000, free_on_gpu: Some(2000), needs: Vec::new() };
        let add = |plan: &mut Plan, need| plan.add([need]).map_err(|error| error.to_string());
        add(&mut plan, MemoryNeed::lasting("the buffer", 900, "`n_ctxs`")).unwrap();
        add(&mut plan, MemoryNeed::passing("a step", 800, "the batch")).unwrap();
        add(&mut plan, MemoryNeed::passing("another step", 1000, "the batch")).unwrap();
        add(&mut plan, MemoryNeed::lasting("a copy", 950, "`checkpoint_every`").on_host()).unwrap();
        assert_eq!((plan.peak(Device::Cuda(0)), plan.peak(Device::Cpu)), (1900, 950));
        let said = add(&mut plan, MemoryNeed::lasting("an SAE", 200, "`dict_size`")).unwrap_err();
        assert!(said.contains("(cuda:0)") && said.contains("is another step: change the batch"), "{said}");
        plan.needs.pop();
        let said = add(&mut plan, MemoryNeed::lasting("one more", 100, "").on_host()).unwrap_err();
        assert!(said.contains("(cpu)") && said.contains("a copy: change `checkpoint_every`"), "{said}");
    }

    /// Returns an entry of /proc/meminfo in bytes.
    #[cfg(target_os = "linux")]
    fn meminfo(name: &str) -> u64 {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn free_memory_matches_the_kernel_within_a_containers_limit() {
        assert_eq!(total(), meminfo("MemTotal"));
        let expected = || {
            let limits = System::new_all().cgroup_limits();
            let limit = limits.map_or(u64::MAX, |limits| left_within(&limits));
            (meminfo("MemAvailable") + meminfo("SwapFree")).min(limit)
        };
        // Other processes allocate and free memory meanwhile.
        let near = |(found, expected): (u64, u64)| found.abs_diff(expected) < expected / 10 + (64 << 20);
        let pairs: Vec<_> = (0..20).map(|_| (free(), expected())).collect();
        assert!(pairs.iter().copied().any(near), "{pairs:?}");
    }

    #[test]
    fn a_need_larger_than_memory_is_refused_and_names_its_field() {
        assert!(check(&MemoryNeed::lasting("a tensor", 1, "`dict_size`")).is_ok());
        let error = check(&MemoryNeed::lasting("a tensor", u64::MAX, "`dict_size`")).unwrap_err();
        assert_eq!(error.key(), "dict_size");
        assert!(error.message().starts_with("a tensor would take 18446744073.7 GB of memory, but "), "{error}");
    }
}
