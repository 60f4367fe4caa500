//! A folder of activations: checks shards against the manifest and reads rows from them.

use std::ops::Range;
use std::path::{Path, PathBuf};

use dictlearn_core::data::manifest::{Manifest, Shard, TOKENS, hash_of_file, shards_in};
use dictlearn_core::files;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::prelude::*;

/// A folder of activations.
pub struct Folder {
    path: PathBuf,
    manifest: Manifest,
    shards: Vec<Open>,
    /// The tensors to read for each row.
    columns: Vec<Column>,
}

/// One shard.
struct Open {
    file: TensorFile,
    /// True until its hash is checked.
    unverified: bool,
}

/// A tensor that every shard has.
struct Column {
    name: String,
    kind: Kind,
    /// Width of a row; `None` for a scalar.
    width: Option<i64>,
}

impl Column {
    fn shape(&self, rows: u64) -> Vec<i64> {
        [Some(rows as i64), self.width].into_iter().flatten().collect()
    }
}

impl Folder {
    /// Opens a folder. Returns an error that names any shard that does not match the manifest.
    pub fn open(path: &Path, verify: bool) -> Result<Self> {
        let manifest = Manifest::read(path)?;
        if let Some(other) = shards_in(path).into_iter().find(|name| !manifest.shards.iter().any(|s| s.file == *name)) {
            bail!(
                InputError::new(format!("{}: the folder's meta.json does not list it", path.join(other).display()))
                    .help("move this shard to another folder")
            );
        }
        let kind = manifest.dtype.kind();
        let mut columns = Vec::new();
        for cached in &manifest.sites {
            for (name, width) in cached.tensors.iter().zip([cached.site.activation_dim, cached.site.output_dim]) {
                columns.push(Column { name: name.clone(), kind, width: Some(width) });
            }
        }
        if manifest.tokens {
            let kinds = [Kind::Int, Kind::Int64, Kind::Int];
            columns.extend(TOKENS.iter().zip(kinds).map(|(name, kind)| Column {
                name: (*name).to_owned(),
                kind,
                width: None,
            }));
        }
        let open = |shard: &Shard| {
            let file = open_shard(&path.join(&shard.file), shard, &columns)?;
            Ok(Open { file, unverified: verify })
        };
        let shards = manifest.shards.iter().map(open).collect::<Result<_>>()?;
        Ok(Folder { path: path.to_owned(), manifest, shards, columns })
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the number of rows in all shards.
    pub fn rows(&self) -> u64 {
        self.manifest.activations
    }

    /// Returns the number of rows in each shard.
    pub fn shard_rows(&self) -> Vec<u64> {
        self.manifest.shards.iter().map(|shard| shard.activations).collect()
    }

    /// Returns the size of one row in memory, in bytes.
    pub fn row_bytes(&self) -> u64 {
        self.columns
            .iter()
            .map(|column| column.width.unwrap_or(1) as u64 * column.kind.elt_size_in_bytes() as u64)
            .sum()
    }

    /// Reads rows of several shards. Returns a tensor [n, width] for each column, in the stored dtype.
    pub fn read(&mut self, places: &[(usize, Range<u64>)]) -> Result<Vec<Tensor>> {
        let count: u64 = places.iter().map(|(_, rows)| rows.end - rows.start).sum();
        let empty =
            |column: &Column| Tensor::empty([count as i64, column.width.unwrap_or(1)], (column.kind, Device::Cpu));
        let read: Vec<Tensor> = self.columns.iter().map(empty).collect();
        let mut at = 0;
        for (index, (shard, rows)) in places.iter().enumerate() {
            self.verify(*shard)?;
            let file = &self.shards[*shard].file;
            let length = (rows.end - rows.start) as i64;
            for (column, to) in self.columns.iter().zip(&read) {
                let piece = file.rows(&column.name, rows.start as usize..rows.end as usize)?;
                if column.width.is_some() && !bool::try_from(piece.isfinite().all())? {
                    let bad = piece.isfinite().all_dim(1, false).logical_not().nonzero().int64_value(&[0, 0]);
                    bail!(
                        InputError::new(format!(
                            "{}: row {} of tensor `{}` has a value that is not finite",
                            file.path().display(),
                            rows.start as i64 + bad,
                            column.name
                        ))
                        .help(
                            "a dictionary trained on it would become NaN: write the activations again without this row"
                        )
                    );
                }
                to.narrow(0, at, length).copy_(&piece);
            }
            at += length;
            if places.get(index + 1).is_none_or(|(next, _)| next != shard) {
                self.columns.iter().for_each(|column| file.forget(&column.name));
            }
        }
        Ok(read)
    }

    /// Checks a shard's hash the first time that it is read. Returns an error if the shard has changed.
    fn verify(&mut self, shard: usize) -> Result<()> {
        if !std::mem::take(&mut self.shards[shard].unverified) {
            return Ok(());
        }
        let Shard { file, sha256, .. } = &self.manifest.shards[shard];
        let path = self.path.join(file);
        if hash_of_file(&path)? != *sha256 {
            bail!(
                InputError::new(format!("{} has changed: its hash differs from meta.json", path.display()))
                    .help("copy the file again, or write the activations again")
            );
        }
        Ok(())
    }

    /// Returns the activations of each site, and the tokens, from rows of every column.
    pub fn activations(&self, columns: &[Tensor], device: Device) -> Activations {
        let mut columns = columns.iter();
        let mut next = || columns.next().expect("a column for each tensor of the manifest");
        let mut sites = Vec::new();
        for cached in &self.manifest.sites {
            let mut activations = || next().to_device(device).to_kind(Kind::Float);
            sites.push(match cached.tensors.len() {
                1 => Batch::of(activations()),
                _ => Batch { x: activations(), target: activations() },
            });
        }
        let tokens = self.manifest.tokens.then(|| {
            let columns = TOKENS.map(|_| next().to_kind(Kind::Int64));
            Tensor::cat(&columns, 1).to_device(device)
        });
        Activations { sites, tokens }
    }
}

/// Opens a shard and checks it against the manifest.
fn open_shard(path: &Path, shard: &Shard, columns: &[Column]) -> Result<TensorFile> {
    let refused = |why: String| {
        InputError::new(format!("{}: {why}", path.display()))
            .help("copy the file again, or write the activations again")
    };
    if !path.exists() {
        bail!(refused("the shard is missing".to_owned()));
    }
    let bytes = files::open(path)?.metadata().map_err(|error| refused(error.to_string()))?.len();
    if bytes != shard.bytes {
        bail!(refused(format!("the shard has {bytes} bytes, but meta.json says {}", shard.bytes)));
    }
    let file = TensorFile::open(path)?;
    for column in columns {
        let expected = (column.shape(shard.activations), column.kind);
        let Some(shape) = file.shape(&column.name) else {
            bail!(refused(format!("the shard has no tensor `{}`; it has: {}", column.name, file.names().join(", "))));
        };
        let found = (shape, file.kind(&column.name)?);
        if found != expected {
            bail!(refused(format!(
                "tensor `{}` is {:?} {:?}, but meta.json says {:?} {:?}",
                column.name, found.1, found.0, expected.1, expected.0
            )));
        }
    }
    Ok(file)
}
