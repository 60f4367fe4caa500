//! The batches of a source of activations.

use dictlearn_core::data::{Activations, Site, SourceConfig, SourceCx, Stream, TaggedSource};
use dictlearn_core::files::from_yaml;

use crate::Result;

/// Iterates over the batches of a source. Sources that can be rewound restart at the end.
///
/// ```
/// use dictlearn::Batches;
///
/// let mut batches = Batches::from_yaml("{type: synthetic, activation_dim: 16, n_features: 32, batch_size: 64}")?;
/// let batch = batches.next().expect("synthetic data does not end")?;
/// assert_eq!(batch.sites[0].x.size(), [64, 16]);
/// # Ok::<(), dictlearn::Error>(())
/// ```
pub struct Batches(Stream);

impl Batches {
    /// Builds a source and returns its batches from the beginning.
    ///
    /// # Errors
    ///
    /// Errors of the source, such as a missing file or a model that cannot be read.
    pub fn new(source: &(impl SourceConfig + ?Sized), cx: &SourceCx) -> Result<Self> {
        Ok(Batches(Stream::new(source.build(cx)?)))
    }

    /// Builds a source from YAML, as under a config's `source`, and returns its batches, on the CPU.
    ///
    /// # Errors
    ///
    /// As [`Batches::new`], and [`Error::Input`](crate::Error::Input) for invalid YAML.
    pub fn from_yaml(yaml: &str) -> Result<Self> {
        let source: Box<dyn TaggedSource> = from_yaml(yaml)?;
        Batches::new(&*source, &SourceCx::default())
    }

    /// Returns the places that each batch has activations of, with their widths.
    pub fn sites(&self) -> Vec<Site> {
        self.0.source_ref().sites()
    }
}

impl Iterator for Batches {
    type Item = Result<Activations>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next_batch().map_err(Into::into).transpose()
    }
}
