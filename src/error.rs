//! The library's error type.

use dictlearn_core::error::InputError;
use dictlearn_core::hub::HubError;
use dictlearn_core::interrupt::Interrupted;
use dictlearn_core::train::NotFinite;

/// An error of this library. [`std::fmt::Display`] prints the full message, with known file, line, column and advice.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Invalid input: a config, an argument, the content of a file or the shape of a tensor.
    #[error(transparent)]
    Input(InputError),
    /// A file cannot be read or written.
    #[error("{0:#}")]
    Io(anyhow::Error),
    /// The Hugging Face Hub cannot be reached, or a request to it failed.
    #[error("{0:#}")]
    Hub(anyhow::Error),
    /// A loss or a gradient is not finite, of a [`Trainer`](crate::Trainer) or of every SAE of a run.
    #[error("{0:#}")]
    Diverged(anyhow::Error),
    /// The process was asked to end, and the operation stopped in a state that can be saved.
    #[error("interrupted")]
    Interrupted,
    /// Any other error: from libtorch, from a plugin, or a bug in this library.
    #[error("{0:#}")]
    Other(anyhow::Error),
}

/// A result of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        let is = |kind: fn(&(dyn std::error::Error + 'static)) -> bool| error.chain().any(kind);
        if is(|cause| cause.is::<Interrupted>()) {
            Error::Interrupted
        } else if is(|cause| cause.is::<HubError>()) {
            Error::Hub(error)
        } else if is(|cause| cause.is::<NotFinite>()) {
            Error::Diverged(error)
        } else {
            match InputError::take(error) {
                Ok(input) => Error::Input(input),
                Err(error) if error.chain().any(|cause| cause.is::<std::io::Error>()) => Error::Io(error),
                Err(error) => Error::Other(error),
            }
        }
    }
}

impl From<InputError> for Error {
    fn from(error: InputError) -> Self {
        Error::Input(error)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use dictlearn_core::train::Quantity;

    use super::*;

    #[test]
    fn error_kind_follows_from_its_cause() {
        let kind = |error: anyhow::Error| Error::from(error.context("outer"));
        assert!(matches!(kind(InputError::new("x").into()), Error::Input(input) if input.message() == "outer: x"));
        assert!(matches!(kind(Interrupted.into()), Error::Interrupted));
        assert!(matches!(kind(HubError("x".to_owned()).into()), Error::Hub(_)));
        let diverged = NotFinite { step: 1, quantity: Quantity::Loss, message: "x".to_owned() };
        assert!(matches!(kind(diverged.into()), Error::Diverged(_)));
        assert!(matches!(kind(anyhow::anyhow!("x")), Error::Other(_)));
        let missing = std::fs::read("/nowhere/at/all").context("cannot read it").unwrap_err();
        let Error::Io(error) = kind(missing) else { panic!("not an Io error") };
        assert!(Error::Io(error).to_string().starts_with("outer: cannot read it: "));
    }
}
