//! How many of a synthetic source's true features a dictionary has recovered.
//!
//! Each true direction gᵢ is matched with a distinct decoder direction dⱼ, to maximise the sum of the cosines (an
//! optimal assignment, by the Hungarian method). Then
//!
//! ```text
//! mean_max_cosine_similarity   mean over i of cos(gᵢ, d_match(i))     0 for gᵢ without a match
//! frac_features_recovered      fraction of the gᵢ with cos(gᵢ, d_match(i)) above `threshold`
//! ```
//!
//! Without the matching, as in the mean max cosine similarity of Sharkey et al. 2022, a decoder direction between two
//! true ones would count twice.

use dictlearn_core::prelude::*;
use pathfinding::prelude::{Matrix, kuhn_munkres};

/// Fraction of true features that a dictionary has recovered.
#[component(metric "ground_truth_recovery",
    summary = "Fraction of a synthetic source's true features that the decoder has recovered",
    paper = "Sharkey et al. 2022 (adapted), Taking features out of superposition with sparse autoencoders, \
        https://www.alignmentforum.org/posts/z6QQJbtpkEAX3Aojj", example = "{type: ground_truth_recovery}", default)]
pub struct RecoveryConfig {
    /// Cosine above which a feature counts as recovered.
    #[default(0.9)]
    #[schemars(range(min = 0, max = 1))]
    pub threshold: f64,
}

impl Metric for RecoveryConfig {
    fn evaluate(&mut self, subjects: &[Subject], source: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>> {
        let Some(truth) = source.true_features() else { bail!("the source has no true features") };
        subjects.iter().map(|subject| self.figures(&truth, subject.dictionary)).collect::<Result<_>>().map(Some)
    }

    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        match source.true_features() {
            Some(_) => None,
            None => Some("the true features of the source's activations are unknown".to_owned()),
        }
    }
}

impl RecoveryConfig {
    fn figures(&self, truth: &Tensor, dictionary: &dyn Dictionary) -> Result<Figures> {
        // A dictionary without a decoder weight decodes each feature separately.
        let found = match dictionary.directions() {
            Some(directions) => directions,
            None => {
                let features = dictionary.dims().features;
                let one_each = Tensor::eye(features, (Kind::Float, truth.device()));
                let none = Tensor::zeros([1, features], (Kind::Float, truth.device()));
                dictionary.decode(&one_each) - dictionary.decode(&none)
            }
        };
        let cosines = matched(&cosines(truth, &found))?;
        let count = truth.size()[0] as f64;
        let above = cosines.iter().filter(|cosine| **cosine > self.threshold).count();
        Ok(figures([
            ("mean_max_cosine_similarity", cosines.iter().sum::<f64>() / count),
            ("frac_features_recovered", above as f64 / count),
        ]))
    }
}

/// Cosines `[n, F]` of the rows of `truth` `[n, d]` with the rows of `found` `[F, d]`.
fn cosines(truth: &Tensor, found: &Tensor) -> Tensor {
    let unit = |rows: &Tensor| rows / rows.norm_scalaropt_dim(2.0, [1], true).clamp_min(1e-12);
    unit(truth).matmul(&unit(&found.detach()).transpose(0, 1))
}

/// Cosines of an optimal assignment between rows and columns, min(n, F) of them.
fn matched(cosines: &Tensor) -> Result<Vec<f64>> {
    // The Hungarian method needs integers; nine digits of a cosine are enough.
    const ONE: f64 = 1e9;
    let size = cosines.size();
    let cosines = if size[0] <= size[1] { cosines.shallow_clone() } else { cosines.transpose(0, 1) };
    let rows: Vec<Vec<f64>> = Vec::try_from(cosines.to_kind(Kind::Double).to_device(Device::Cpu))?;
    let weights = Matrix::from_rows(rows.iter().map(|row| row.iter().map(|cosine| (cosine * ONE) as i64)))?;
    let (_, partners) = kuhn_munkres(&weights);
    Ok(partners.iter().enumerate().map(|(row, column)| rows[row][*column]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_true_feature_is_matched_with_a_direction_of_its_own() {
        let truth = Tensor::from_slice2(&[[1.0f32, 0.0], [0.6, 0.8]]);
        // Both true features are nearest to the first direction; one of them must take the second.
        let found = Tensor::from_slice2(&[[2.0f32, 1.0], [0.0, 3.0]]);
        let cosines = matched(&cosines(&truth, &found)).unwrap();
        assert!((cosines[0] - 2.0 / 5.0f64.sqrt()).abs() < 1e-6 && (cosines[1] - 0.8).abs() < 1e-6, "{cosines:?}");
    }

    #[test]
    fn opposite_directions_do_not_match_and_fewer_directions_match_fewer_features() {
        let truth = Tensor::eye(3, (Kind::Float, Device::Cpu));
        let found = Tensor::from_slice2(&[[-1.0f32, 0.0, 0.0], [0.0, 0.0, 5.0]]);
        let mut cosines = matched(&cosines(&truth, &found)).unwrap();
        cosines.sort_by(f64::total_cmp);
        assert_eq!(cosines, [0.0, 1.0]);
    }
}
