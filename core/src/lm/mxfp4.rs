//! MXFP4, the 4-bit floating-point format of published gpt-oss weights (Open Compute Project 2023, "OCP Microscaling
//! Formats", <https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf>): blocks of 32
//! numbers of 4 bits share a power of two.

use anyhow::Result;
use tch::{Kind, Tensor};

/// Numbers in a block.
pub(super) const BLOCK: i64 = 32;

/// Values of the 16 codes.
const CODES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Returns the shapes of the codes [E, out, in / 32, 16] and scales [E, out, in / 32] of a tensor [E, in, out]; both are
/// bytes. `None` if its inner dimension has no whole number of blocks.
pub(super) fn shapes(shape: &[i64]) -> Option<(Vec<i64>, Vec<i64>)> {
    let [count, input, output] = *shape else { return None };
    let blocks = (input % BLOCK == 0).then_some(input / BLOCK)?;
    Some((vec![count, output, blocks, BLOCK / 2], vec![count, output, blocks]))
}

/// Decodes one entry [in, out] from its codes and scales, as a transposed view of [out, in] in dtype `kind`: code c under
/// scale s is `CODES[c] · 2^(s − 127)`, the lower half of a byte first.
pub(super) fn decode(codes: &[u8], scales: &[u8], output: i64, kind: Kind) -> Result<Tensor> {
    let powers: Vec<f32> = (0..256).map(|scale| 2_f64.powi(scale - 127) as f32).collect();
    let mut numbers = Vec::with_capacity(codes.len() * 2);
    for (codes, scale) in codes.chunks_exact(BLOCK as usize / 2).zip(scales) {
        let power = powers[usize::from(*scale)];
        numbers
            .extend(codes.iter().flat_map(|pair| [pair & 15, pair >> 4]).map(|code| CODES[usize::from(code)] * power));
    }
    Ok(Tensor::f_from_slice(&numbers)?.f_view([output, -1])?.to_kind(kind).tr())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_scaled_by_powers_of_two_the_lower_half_first() {
        let codes: Vec<u8> = (0..16).collect();
        let scales = [127 + 3, 0];
        let tensor = decode(&[codes.clone(), codes].concat(), &scales, 2, Kind::Float).unwrap();
        assert_eq!(tensor.size(), [32, 2]);
        let column = Vec::<f32>::try_from(tensor.select(1, 0).contiguous()).unwrap();
        assert_eq!(column[..8], [0.0, 0.0, 4.0, 0.0, 8.0, 0.0, 12.0, 0.0]);
        assert_eq!(column[18..20], [-4.0, 0.0], "code 9");
        let small = tensor.double_value(&[2, 1]);
        assert_eq!(small, 0.5 * 2_f64.powi(-127));
    }

    #[test]
    fn shapes_need_whole_blocks() {
        assert_eq!(shapes(&[4, 64, 80]), Some((vec![4, 80, 2, 16], vec![4, 80, 2])));
        assert_eq!(shapes(&[4, 40, 80]), None);
        assert_eq!(shapes(&[64, 80]), None);
    }
}
