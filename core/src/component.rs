//! What [`component`](macro@crate::component) declares: the config traits as objects that YAML names by `type`.
//!
//! Authors implement the plain traits (`DictionaryConfig`); the attribute implements the tagged ones, which a config holds
//! in boxes.

use crate::dictionary::DictionaryConfig;
use crate::format::Format;
use crate::logger::LoggerConfig;
use crate::metric::MetricConfig;
use crate::modifier::ModifierConfig;
use crate::schedule::RunLength;
use crate::source::SourceConfig;
use crate::text::TextConfig;
use crate::trainer::TrainerConfig;

macro_rules! tagged {
    ($($(#[$doc:meta])* $tagged:ident: $config:ident { $($method:tt)* })*) => {$(
        $(#[$doc])*
        #[typetag::serde(tag = "type")]
        pub trait $tagged: $config {
            #[doc(hidden)]
            fn boxed(&self) -> Box<dyn $tagged>;
            $($method)*
        }

        impl Clone for Box<dyn $tagged> {
            fn clone(&self) -> Self {
                self.boxed()
            }
        }
    )*};
}

tagged! {
    /// A dictionary's config, by `type`.
    TaggedDictionary: DictionaryConfig {}
    /// A trainer's config, by `type`.
    TaggedTrainer: TrainerConfig {
        /// Adapts the defaults of the shared fields to the length of the run.
        #[doc(hidden)]
        fn adapt_shared(&mut self, length: &mut RunLength);
    }
    /// A modifier's config, by `type`.
    TaggedModifier: ModifierConfig {}
    /// A source's config, by `type`.
    TaggedSource: SourceConfig {}
    /// A text's config, by `type`.
    TaggedText: TextConfig {}
    /// A metric's config, by `type`.
    TaggedMetric: MetricConfig {}
    /// A logger's config, by `type`.
    TaggedLogger: LoggerConfig {}
    /// A format, by `type`.
    TaggedFormat: Format {}
}

impl dyn TaggedTrainer {
    /// Adapts the defaults to the length of the run: those of the shared fields, then the trainer's own
    /// ([`TrainerConfig::adapt`]).
    pub fn adapt_defaults(&mut self, length: &mut RunLength) {
        self.adapt_shared(length);
        self.adapt(length);
    }
}
