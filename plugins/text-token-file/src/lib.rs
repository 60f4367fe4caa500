//! Token ids from a .safetensors file: `input_ids` [B, L] and, if there is padding, `attention_mask` [B, L]. Each row
//! is one context.

use std::collections::BTreeMap;
use std::path::Path;

use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::prelude::*;

/// Token ids from a .safetensors file.
#[component(text "token_file", summary = "Token ids from a .safetensors file, one context per row",
    example = "{type: token_file, path: tokens.safetensors}")]
pub struct TokenFileConfig {
    /// A .safetensors file with `input_ids` [B, L] and, if there is padding, `attention_mask` [B, L].
    pub path: ConfigPath,
}

impl TextConfig for TokenFileConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let (ids, mask) = read(self.path.as_path()).under("path")?;
        let length = self.path.as_path().metadata().map_or(0, |file| file.len());
        Ok(Box::new(TokenFile { ids, mask, row: 0, file: (self.path.to_string(), length) }))
    }
}

fn read(path: &Path) -> Result<(Tensor, Tensor)> {
    if !path.exists() {
        bail!(InputError::no_file(path));
    }
    let file = TensorFile::open(path)?;
    let refused = |message: String| InputError::new(format!("{}: {message}", path.display()));
    let ids = file.tensor("input_ids")?;
    let integers = matches!(ids.kind(), Kind::Int64 | Kind::Int | Kind::Int16 | Kind::Uint8);
    if ids.dim() != 2 || !integers {
        bail!(
            refused(format!("`input_ids` has shape {:?} and type {:?}", ids.size(), ids.kind()))
                .help("give integers of shape [rows, positions]")
        );
    }
    let mask = match file.has("attention_mask") {
        true => file.tensor("attention_mask")?.not_equal(0),
        false => ids.ones_like().to_kind(Kind::Bool),
    };
    if mask.size() != ids.size() {
        bail!(refused(format!(
            "`attention_mask` has shape {:?}, but `input_ids` has shape {:?}",
            mask.size(),
            ids.size()
        )));
    }
    Ok((ids.to_kind(Kind::Int64), mask))
}

struct TokenFile {
    ids: Tensor,
    mask: Tensor,
    row: i64,
    file: (String, u64),
}

impl TextStream for TokenFile {
    fn next_record(&mut self) -> Result<Option<Record>> {
        if self.row >= self.ids.size()[0] {
            return Ok(None);
        }
        let ids = Vec::<i64>::try_from(self.ids.get(self.row))?;
        let mask = Vec::<bool>::try_from(self.mask.get(self.row))?;
        let origin = format!("row {}", self.row);
        self.row += 1;
        Ok(Some(Record::Tokens { ids, mask, origin }))
    }

    fn is_tokenized(&self) -> bool {
        true
    }

    fn longest_row(&self) -> Option<i64> {
        Some(self.ids.size()[1])
    }

    fn files(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([self.file.clone()])
    }

    fn position(&self) -> u64 {
        self.row as u64
    }

    fn seek(&mut self, position: u64) -> Result<()> {
        self.row = position as i64;
        Ok(())
    }
}
