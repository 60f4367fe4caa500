//! How many of the features that activations were made of a dictionary has found.
//!
//! Each true direction gᵢ is matched with a decoder direction dⱼ of its own so that the sum of the cosines is greatest
//! (an optimal assignment, by the Hungarian method). Then
//!
//! ```text
//! mean_max_cosine_similarity   mean over i of cos(gᵢ, d_match(i))     0 for what has no partner
//! frac_features_recovered      part of the gᵢ with cos(gᵢ, d_match(i)) above `threshold`
//! ```
//!
//! Without the matching, the mean max cosine similarity of Sharkey et al. 2022, one decoder direction between two true
//! ones would count twice.

use dictlearn_core::prelude::*;
use pathfinding::prelude::{Matrix, kuhn_munkres};

/// How many known features a dictionary has found.
#[component(metric "ground_truth_recovery",
    summary = "Part of a synthetic source's true features that the decoder has found",
    paper = "after Sharkey et al. 2022, Taking features out of superposition with sparse autoencoders, \
        https://www.alignmentforum.org/posts/z6QQJbtpkEAX3Aojj", example = "{type: ground_truth_recovery}", default)]
pub struct RecoveryConfig {
    /// The cosine from which on a feature counts as found.
    #[default(0.9)]
    #[schemars(range(min = 0, max = 1))]
    pub threshold: f64,
}

impl Metric for RecoveryConfig {
    fn evaluate(&mut self, subjects: &[Subject], source: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>> {
        let Some(truth) = source.true_features() else { bail!("the source does not know its features") };
        subjects.iter().map(|subject| self.figures(&truth, subject.dictionary)).collect::<Result<_>>().map(Some)
    }

    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        match source.true_features() {
            Some(_) => None,
            None => Some("the source does not know the features that its activations are made of".to_owned()),
        }
    }
}

impl RecoveryConfig {
    fn figures(&self, truth: &Tensor, dictionary: &dyn Dictionary) -> Result<Figures> {
        // A dictionary without a decoder reconstructs each feature by itself.
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

/// Of each row of [n, d] with each row of [F, d]: [n, F].
fn cosines(truth: &Tensor, found: &Tensor) -> Tensor {
    let unit = |rows: &Tensor| rows / rows.norm_scalaropt_dim(2.0, [1], true).clamp_min(1e-12);
    unit(truth).matmul(&unit(&found.detach()).transpose(0, 1))
}

/// The cosines of an optimal assignment of rows to columns, as many as there are of the fewer.
fn matched(cosines: &Tensor) -> Result<Vec<f64>> {
    // Whole numbers, as the Hungarian method wants them: a cosine is exact to nine digits.
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
    fn each_feature_has_a_partner_of_its_own() {
        let truth = Tensor::from_slice2(&[[1.0f32, 0.0], [0.6, 0.8]]);
        // Both true features are nearest to the first direction; the second must do for one of them.
        let found = Tensor::from_slice2(&[[2.0f32, 1.0], [0.0, 3.0]]);
        let cosines = matched(&cosines(&truth, &found)).unwrap();
        assert!((cosines[0] - 2.0 / 5.0f64.sqrt()).abs() < 1e-6 && (cosines[1] - 0.8).abs() < 1e-6, "{cosines:?}");
    }

    #[test]
    fn the_opposite_direction_is_not_the_feature_and_fewer_directions_find_fewer() {
        let truth = Tensor::eye(3, (Kind::Float, Device::Cpu));
        let found = Tensor::from_slice2(&[[-1.0f32, 0.0, 0.0], [0.0, 0.0, 5.0]]);
        let mut cosines = matched(&cosines(&truth, &found)).unwrap();
        cosines.sort_by(f64::total_cmp);
        assert_eq!(cosines, [0.0, 1.0]);
    }
}
