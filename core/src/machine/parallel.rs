//! Parallel loops over the elements of CPU tensors, on libtorch's threads.

use std::ops::Range;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};

use tch::{Device, Kind, Tensor};

/// Element type of a tensor.
pub(crate) trait Number: Copy + Send + Sync {
    /// Kind of its tensors.
    const KIND: Kind;
    fn get(self) -> f32;
    fn of(value: f32) -> Self;
}

impl Number for f32 {
    const KIND: Kind = Kind::Float;
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }
}

/// A bfloat16: the upper half of a float32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

impl Number for Bf16 {
    const KIND: Kind = Kind::BFloat16;
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    /// Rounds to nearest, ties to even, as libtorch does.
    #[inline(always)]
    fn of(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        Bf16(if value.is_nan() { 0x7fc0 } else { rounded as u16 })
    }
}

/// Returns the elements of a contiguous CPU tensor. Panics for any other tensor.
pub(crate) fn numbers<T: Number>(tensor: &Tensor) -> &[T] {
    check::<T>(tensor);
    if tensor.numel() == 0 {
        // An empty tensor has a null pointer.
        return &[];
    }
    // SAFETY: a contiguous CPU tensor of this kind has `numel` elements at `data_ptr` while it is borrowed.
    unsafe { slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// Elements of a tensor or slice that several threads write, each its own rows.
pub(crate) struct Output<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: callers of `part` promise that parts do not overlap.
unsafe impl<T: Send> Sync for Output<T> {}

/// Panics unless the tensor is contiguous, on the CPU and of this element type.
fn check<T: Number>(tensor: &Tensor) {
    assert!(tensor.is_contiguous() && tensor.kind() == T::KIND && tensor.device() == Device::Cpu, "{tensor:?}");
}

impl<T: Number> Output<T> {
    /// Borrows the elements of a tensor.
    pub fn of(tensor: &mut Tensor) -> Self {
        check::<T>(tensor);
        Output { start: tensor.data_ptr().cast(), len: tensor.numel() }
    }
}

impl<T> Output<T> {
    /// Borrows a slice, which must not be used otherwise meanwhile.
    pub fn over(slice: &mut [T]) -> Self {
        Output { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// Returns a range of the elements for writing.
    ///
    /// # Safety
    /// Ranges requested by different threads must not overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        if range.is_empty() {
            return &mut [];
        }
        // SAFETY: the range is in bounds, and no other thread has it.
        unsafe { slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Number of elements that justifies another thread.
const CHUNK: usize = 1 << 14;

/// Calls `one` with each item on libtorch's threads, in which every operation of libtorch runs on one thread. Items and
/// captures may hold tensors: those without gradients may be read by all, and each call may write tensors of its own.
pub(crate) fn each<T>(items: &[T], one: impl Fn(&T)) {
    struct Shared<T>(T);
    // SAFETY: libtorch counts references atomically, and reading a tensor changes nothing.
    unsafe impl<T> Sync for Shared<T> {}
    let shared = Shared((items, one));
    share_in(items.len(), 1, |range| {
        let Shared((items, one)) = &shared;
        tch::no_grad(|| items[range].iter().for_each(one));
    });
}

/// Splits `0..rows` into ranges and calls `work` with each, on libtorch's threads. A row has `width` elements.
pub(crate) fn share(rows: usize, width: usize, work: impl Fn(Range<usize>) + Sync) {
    share_in(rows, CHUNK / width.max(1), work);
}

/// Does the same with `chunk` rows per range.
pub(crate) fn share_in(rows: usize, chunk: usize, work: impl Fn(Range<usize>) + Sync) {
    let chunk = chunk.max(1);
    let chunks = rows.div_ceil(chunk);
    let next = AtomicUsize::new(0);
    threads::run(chunks.min(tch::get_num_threads().max(1) as usize), &|| loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= chunks {
            break;
        }
        work(index * chunk..rows.min((index + 1) * chunk));
    });
}

/// libtorch's threads. Another pool would compete with them for cores, because they keep spinning after each operation.
mod threads {
    use std::ffi::{c_uint, c_void};
    use std::sync::OnceLock;

    type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

    /// Returns the entry point of libtorch's OpenMP library, if it is GNU's.
    fn parallel() -> Option<Parallel> {
        static FOUND: OnceLock<Option<Parallel>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            // SAFETY: only looks up a name. GNU OpenMP exports it with this signature.
            let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
            (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(found) })
        })
    }

    extern "C" fn call(work: *mut c_void) {
        // SAFETY: `run` passes a pointer to a reference that outlives the call.
        let work = unsafe { *work.cast::<&(dyn Fn() + Sync)>() };
        work();
    }

    /// Calls `work` on `count` threads and waits for all; on this thread alone if libtorch's are not available.
    pub fn run(count: usize, work: &(dyn Fn() + Sync)) {
        match parallel().filter(|_| count > 1) {
            // SAFETY: `parallel` returns after all threads have left `call`, and `work` is `Sync`.
            Some(parallel) => unsafe {
                let mut work = work;
                parallel(call, (&raw mut work).cast(), count as c_uint, 0);
            },
            None => work(),
        }
    }
}
