//! The matching pursuit autoencoder: Costa et al. 2025, *From Flat to Hierarchical: Extracting Sparse Representations
//! with Matching Pursuit*, <https://arxiv.org/abs/2506.03093>.
//!
//! There is no encoder. Features of an activation x `[d]` are selected one at a time, by the direction d_i (a row of
//! W_dec `[F, d]`) that explains most of what is left, as in sae_lens:
//!
//! ```text
//! r ← x − b
//! repeat: i = argmax relu(r · d_i),  v = relu(r · d_i),  f_i ← f_i + v,  r ← r − v d_i
//! x̂ = f W_dec + b
//! ```
//!
//! A row stops after `max_iterations` steps; with `stop_on_duplicate_support`, after a step that selects no new
//! feature; with a `residual_threshold` above 0, once ‖r‖ is below it. Directions are used as they are, whatever their
//! norms.
//!
//! Published SAEs can be imported and used. No trainer trains this dictionary yet.

use dictlearn_core::prelude::*;

const CLASS: &str = "MatchingPursuitSAE";

/// Upper bound of `max_iterations`: two opposite directions of norm √2 would be selected in turn for ever.
const MOST_ITERATIONS: i64 = 1 << 20;

/// sae_lens's `MatchingPursuitSAE`.
#[derive(Debug)]
pub struct MatchingPursuit {
    w_dec: Tensor,                     // [F, d]
    b_dec: Tensor,                     // [d]
    residual_threshold: Tensor,        // scalar
    max_iterations: Tensor,            // int64 scalar
    stop_on_duplicate_support: Tensor, // int64 scalar, 0 or 1
}

inventory::submit! {
    SavedClass {
        class: CLASS,
        name: "matching_pursuit",
        shaped: |saved| {
            let [features, d] = saved.shape("W_dec")?;
            let [width] = saved.shape("b_dec")?;
            if width != d {
                bail!(InputError::new(format!("`b_dec` has {width} values, but `W_dec` has rows of {d}")));
            }
            let steps = saved.tensors.get("max_iterations").filter(|steps| steps.numel() == 1);
            let steps = steps.map_or(-1, |steps| steps.reshape([1]).to_kind(Kind::Int64).int64_value(&[0]));
            if !(0..=MOST_ITERATIONS).contains(&steps) {
                bail!(InputError::new(format!(
                    "`max_iterations` is {steps}, but must be from 0 to {MOST_ITERATIONS}; d_in, {d}, is the default"
                )));
            }
            let whole = || Tensor::zeros([0_i64; 0], (Kind::Int64, saved.device));
            Ok(Box::new(MatchingPursuit {
                w_dec: saved.zeros(&[features, d]),
                b_dec: saved.zeros(&[d]),
                residual_threshold: Tensor::zeros([0_i64; 0], (Kind::Float, saved.device)),
                max_iterations: whole(),
                stop_on_duplicate_support: whole(),
            }))
        },
    }
}

impl Dictionary for MatchingPursuit {
    fn class(&self) -> &'static str {
        CLASS
    }

    fn dims(&self) -> Dims {
        let size = self.w_dec.size();
        Dims { input: size[1], features: size[0], output: size[1] }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![("W_dec", self.w_dec.shallow_clone()), ("b_dec", self.b_dec.shallow_clone())]
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        vec![
            ("residual_threshold", self.residual_threshold.shallow_clone()),
            ("max_iterations", self.max_iterations.shallow_clone()),
            ("stop_on_duplicate_support", self.stop_on_duplicate_support.shallow_clone()),
        ]
    }

    fn encode(&self, x: &Tensor) -> Tensor {
        let Dims { input, features, .. } = self.dims();
        let mut shape = x.size();
        let mut residual = (x - &self.b_dec).reshape([-1, input]);
        let rows = residual.size()[0];
        let options = (residual.kind(), residual.device());
        let mut found = Tensor::zeros([rows, features], options);
        let mut active = Tensor::ones([rows, 1], options);
        let by_threshold = self.residual_threshold.double_value(&[]) > 0.0;
        let by_support = self.stop_on_duplicate_support.int64_value(&[]) != 0;
        for _ in 0..self.max_iterations.int64_value(&[]) {
            let best = residual.matmul(&self.w_dec.tr()).relu().argmax(1, true);
            let chosen = self.w_dec.index_select(0, &best.squeeze_dim(1));
            let values = (&residual * &chosen).sum_dim_intlist([-1].as_slice(), true, residual.kind()).relu() * &active;
            // Only the chosen entry of each row can have changed from 0.
            let fired = found.gather(1, &best, false).not_equal(0.0);
            found = found.scatter_add(1, &best, &values);
            residual -= &values * chosen;
            let mut goes_on = match by_support {
                true => found.gather(1, &best, false).not_equal(0.0).not_equal_tensor(&fired),
                // Without a positive product, nothing changes any more.
                false => values.gt(0.0),
            };
            if by_threshold {
                let norms = residual.norm_scalaropt_dim(2.0, [-1], true);
                goes_on = goes_on.logical_and(&norms.ge_tensor(&self.residual_threshold));
            }
            active *= goes_on;
            if active.any().int64_value(&[]) == 0 {
                break;
            }
        }
        shape.pop();
        shape.push(features);
        found.reshape(shape)
    }

    fn decode(&self, features: &Tensor) -> Tensor {
        features.matmul(&self.w_dec) + &self.b_dec
    }

    fn decoder(&self) -> Option<Weight> {
        Some(Weight { name: "W_dec", tensor: self.w_dec.shallow_clone(), feature_dim: 0 })
    }

    fn scale_biases(&mut self, scale: f64) {
        scale_in_place(&self.b_dec, scale);
        scale_in_place(&self.residual_threshold, scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pursuit(directions: &[f32], residual_threshold: f32, max_iterations: i64, by_support: bool) -> MatchingPursuit {
        MatchingPursuit {
            w_dec: Tensor::from_slice(directions).reshape([-1, 2]),
            b_dec: Tensor::from_slice(&[1f32, 0.0]),
            residual_threshold: Tensor::from(residual_threshold),
            max_iterations: Tensor::from(max_iterations),
            stop_on_duplicate_support: Tensor::from(i64::from(by_support)),
        }
    }

    fn features(pursuit: &MatchingPursuit, x: [f32; 2]) -> Vec<f32> {
        Vec::try_from(pursuit.encode(&Tensor::from_slice(&x))).unwrap()
    }

    #[test]
    fn features_are_selected_one_at_a_time() {
        let axes = [1.0, 0.0, 0.0, 1.0];
        assert_eq!(features(&pursuit(&axes, 0.0, 1, true), [3.0, 5.0]), [0.0, 5.0]);
        assert_eq!(features(&pursuit(&axes, 0.0, 2, true), [3.0, 5.0]), [2.0, 5.0]);
        assert_eq!(features(&pursuit(&axes, 3.0, 2, true), [3.0, 5.0]), [0.0, 5.0], "the residual is 2 after one step");
        assert_eq!(features(&pursuit(&axes, 0.0, 2, true), [1.0, -5.0]), [0.0, 0.0]);
    }

    #[test]
    fn a_step_without_a_new_feature_ends_the_pursuit_only_if_asked() {
        // A direction of norm 1/2 explains a quarter of what is left in each step.
        let short = [0.5, 0.0];
        assert_eq!(features(&pursuit(&short, 0.0, 3, false), [9.0, 0.0]), [4.0 + 3.0 + 2.25]);
        assert_eq!(features(&pursuit(&short, 0.0, 3, true), [9.0, 0.0]), [4.0 + 3.0]);
    }
}
