//! Loops of our own over the numbers of CPU tensors, on libtorch's threads.

use std::ops::Range;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};

use tch::{Device, Kind, Tensor};

/// A number of a tensor.
pub(crate) trait Number: Copy + Send + Sync {
    /// What tensors of it are of.
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
    /// To the nearest, to even where two are as near, as libtorch rounds.
    #[inline(always)]
    fn of(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        Bf16(if value.is_nan() { 0x7fc0 } else { rounded as u16 })
    }
}

/// The numbers of a contiguous tensor.
pub(crate) fn numbers<T: Number>(tensor: &Tensor) -> &[T] {
    check::<T>(tensor);
    if tensor.numel() == 0 {
        // libtorch gives it no memory.
        return &[];
    }
    // SAFETY: a contiguous CPU tensor of that kind has `numel` numbers from `data_ptr` on, for as long as it is borrowed.
    unsafe { slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// Numbers to be written by several threads, each its own rows: those of a tensor that was just made, or of a slice.
pub(crate) struct Output<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: `part` hands out parts that do not overlap, which is what its callers promise.
unsafe impl<T: Send> Sync for Output<T> {}

/// Refuses what has no numbers of this type in one piece.
fn check<T: Number>(tensor: &Tensor) {
    assert!(tensor.is_contiguous() && tensor.kind() == T::KIND && tensor.device() == Device::Cpu, "{tensor:?}");
}

impl<T: Number> Output<T> {
    /// Those of a tensor.
    pub fn of(tensor: &mut Tensor) -> Self {
        check::<T>(tensor);
        Output { start: tensor.data_ptr().cast(), len: tensor.numel() }
    }
}

impl<T> Output<T> {
    /// Over a slice, which nobody else may use as long as this is used.
    pub fn over(slice: &mut [T]) -> Self {
        Output { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// # Safety
    /// No two threads may ask for parts that overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        if range.is_empty() {
            return &mut [];
        }
        // SAFETY: it lies in the tensor, and nobody else has it.
        unsafe { slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Numbers that are worth another thread's while.
const CHUNK: usize = 1 << 14;

/// Calls `work` with ranges that together are `0..rows`, on libtorch's threads. A row has `width` numbers.
pub(crate) fn share(rows: usize, width: usize, work: impl Fn(Range<usize>) + Sync) {
    share_in(rows, CHUNK / width.max(1), work);
}

/// The same with so many rows at a time.
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

/// libtorch's threads. Those of another pool would stand in line with them: they go on spinning for a while after each
/// of libtorch's operations.
mod threads {
    use std::ffi::{c_uint, c_void};
    use std::sync::OnceLock;

    type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

    /// The entry point of the OpenMP library that libtorch runs on, where it is GNU's.
    fn parallel() -> Option<Parallel> {
        static FOUND: OnceLock<Option<Parallel>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            // SAFETY: looks a name up. What GNU's OpenMP exports under it has this signature.
            let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
            (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(found) })
        })
    }

    extern "C" fn call(work: *mut c_void) {
        // SAFETY: `run` passes a pointer to a reference that outlives the call.
        let work = unsafe { *work.cast::<&(dyn Fn() + Sync)>() };
        work();
    }

    /// Calls `work` on so many threads and waits for all; on this one alone where libtorch's cannot be had.
    pub fn run(count: usize, work: &(dyn Fn() + Sync)) {
        match parallel().filter(|_| count > 1) {
            // SAFETY: all threads have returned from `call` when the call returns, and `work` may be shared.
            Some(parallel) => unsafe {
                let mut work = work;
                parallel(call, (&raw mut work).cast(), count as c_uint, 0);
            },
            None => work(),
        }
    }
}
