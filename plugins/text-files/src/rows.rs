//! Reads the values of one column of a .parquet file, row group by row group.

use std::fs::File;
use std::sync::Arc;

use dictlearn_core::prelude::*;
use parquet::basic::Type as Physical;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use crate::cell::{Cell, Unreadable};

/// Name of the column that marks padding with 0.
const MASK: &str = "attention_mask";

/// The values of a column: strings, or lists of messages or token ids.
pub struct Rows {
    name: String,
    rows: RowIter<'static>,
    /// Names of the enclosing groups, outermost first, and of the column.
    path: Vec<String>,
    column: String,
    ended: bool,
}

impl Rows {
    /// Opens a file to read the first of `columns` that it has.
    pub fn open(name: &str, file: File, columns: &[String]) -> Result<Self> {
        let refused =
            |error: parquet::errors::ParquetError| Unreadable(format!("{name} is not a valid parquet file: {error}"));
        let reader = SerializedFileReader::new(file).map_err(refused)?;
        let schema = reader.metadata().file_metadata().schema();
        let found = columns.iter().find_map(|column| Some((column, path(schema, column)?)));
        let Some((column, types)) = found else {
            let known = readable(schema);
            let column = columns.first().map_or("text", String::as_str);
            bail!(
                InputError::new(format!("{name} has no column `{column}` of strings or lists")).field("column").help(
                    match known.is_empty() {
                        true => "it has no columns of strings or lists".to_owned(),
                        false => format!("its columns of strings and lists are: {}", known.join(", ")),
                    }
                )
            );
        };
        let (groups, column_type) = types.split_at(types.len() - 1);
        let mut fields = column_type.to_vec();
        let siblings = groups.last().map_or(schema, |group| &**group).get_fields();
        if !is_string(&column_type[0]) {
            fields.extend(siblings.iter().find(|sibling| sibling.name() == MASK && !is_string(sibling)).cloned());
        }
        for group in groups.iter().rev() {
            let only = Type::group_type_builder(group.name()).with_repetition(group.get_basic_info().repetition());
            fields = vec![Arc::new(only.with_fields(fields).build().map_err(refused)?)];
        }
        let only = Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(refused)?;
        let path = types.iter().map(|part| part.name().to_owned()).collect();
        let column = column.clone();
        let rows = RowIter::from_file_into(Box::new(reader)).project(Some(only)).map_err(refused)?;
        Ok(Rows { name: name.to_owned(), rows, path, column, ended: false })
    }

    /// Returns the next row's value, or why it has none; `None` at the end.
    pub fn next_row(&mut self) -> Result<Option<std::result::Result<Cell, String>>, Unreadable> {
        if self.ended {
            return Ok(None);
        }
        let Some(row) = self.rows.next() else { return Ok(None) };
        let row = row.map_err(|error| {
            self.ended = true;
            Unreadable(format!("{} is damaged or truncated: {error}", self.name))
        })?;
        let value = match field(&row, &self.path) {
            Some(Field::Str(text)) => Ok(text.clone().into()),
            // The schema need not declare that bytes are text.
            Some(Field::Bytes(bytes)) => match String::from_utf8(bytes.data().to_vec()) {
                Ok(text) => Ok(text.into()),
                Err(_) => {
                    self.ended = true;
                    let why = "has bytes that are not UTF-8: if it is Latin-1, decode the column and rewrite the file";
                    return Err(Unreadable(format!("{}: column `{}` {why}", self.name, self.column)));
                }
            },
            Some(list @ (Field::ListInternal(_) | Field::Group(_))) => Ok(list.to_json_value()),
            _ => Err("this row has no text".to_owned()),
        };
        let mut mask = self.path.clone();
        mask.pop();
        mask.push(MASK.to_owned());
        Ok(Some(value.map(|value| Cell {
            column: self.column.clone(),
            value,
            mask: field(&row, &mask).map(Field::to_json_value),
        })))
    }
}

fn is_string(column: &Type) -> bool {
    column.is_primitive() && column.get_physical_type() == Physical::BYTE_ARRAY
}

/// True if a column may hold text, a chat or token ids.
fn is_readable(column: &Type) -> bool {
    let info = column.get_basic_info();
    is_string(column)
        || column.is_group()
        || (info.has_repetition() && info.repetition() == parquet::basic::Repetition::REPEATED)
}

/// True if a column is a group of named fields, rather than a list or a map.
fn is_struct(column: &Type) -> bool {
    let info = column.get_basic_info();
    let plain = info.logical_type_ref().is_none() && info.converted_type() == parquet::basic::ConvertedType::NONE;
    column.is_group() && plain && info.repetition() != parquet::basic::Repetition::REPEATED
}

/// Returns the column of that name, `text` or `translation.en`, preceded by its enclosing groups.
fn path(group: &Type, column: &str) -> Option<Vec<Arc<Type>>> {
    let fields = group.get_fields();
    if let Some(found) = fields.iter().find(|field| field.name() == column && is_readable(field)) {
        return Some(vec![found.clone()]);
    }
    fields.iter().filter(|field| is_struct(field)).find_map(|field| {
        let rest = column.strip_prefix(field.name())?.strip_prefix('.')?;
        let mut below = path(field, rest)?;
        below.insert(0, field.clone());
        Some(below)
    })
}

/// Returns the names of the columns that may hold text, a chat or token ids.
fn readable(group: &Type) -> Vec<String> {
    let names = |field: &Arc<Type>| -> Vec<String> {
        match is_struct(field) {
            true => readable(field).into_iter().map(|below| format!("{}.{below}", field.name())).collect(),
            false => is_readable(field).then(|| field.name().to_owned()).into_iter().collect(),
        }
    };
    group.get_fields().iter().flat_map(names).collect()
}

/// Returns the field of a row at the end of a path.
fn field<'a>(row: &'a Row, path: &[String]) -> Option<&'a Field> {
    let (name, rest) = path.split_first()?;
    let (_, field) = row.get_column_iter().find(|(known, _)| *known == name)?;
    match field {
        Field::Group(row) if !rest.is_empty() => self::field(row, rest),
        field => rest.is_empty().then_some(field),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    /// Writes two row groups of a number and a text; every third text is missing.
    fn write(path: &Path, compression: Compression) {
        let schema = "message m { required int64 n; optional byte_array text (UTF8); }";
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        for group in 0..2 {
            let mut rows = writer.next_row_group().unwrap();
            let mut column = rows.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(&[0, 1, 2], None, None).unwrap();
            column.close().unwrap();
            let mut column = rows.next_column().unwrap().unwrap();
            let texts = [0, 1].map(|row| ByteArray::from(format!("text {group}.{row}").as_str()));
            column.typed::<ByteArrayType>().write_batch(&texts, Some(&[1, 1, 0]), None).unwrap();
            column.close().unwrap();
            rows.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn open(path: &Path, column: &str) -> Result<Rows> {
        Rows::open("a.parquet", File::open(path).unwrap(), &[column.to_owned()])
    }

    fn read(path: &Path, column: &str) -> Result<Vec<std::result::Result<Cell, String>>> {
        let mut rows = open(path, column)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next_row()? {
            found.push(row);
        }
        Ok(found)
    }

    #[test]
    fn the_column_is_read_through_all_row_groups() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())] {
            write(&path, compression);
            let rows = read(&path, "text").unwrap();
            let texts: Vec<_> = rows.iter().flatten().filter_map(|cell| cell.value.as_str()).collect();
            assert_eq!(texts, ["text 0.0", "text 0.1", "text 1.0", "text 1.1"], "{compression}");
            assert_eq!(rows.len() - texts.len(), 2, "rows without text");
        }
    }

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/text").join(name)
    }

    #[test]
    fn token_ids_of_sae_lens_and_datasets_are_read() {
        let expected: Value = serde_json::from_slice(&std::fs::read(fixture("rows.json")).unwrap()).unwrap();
        for name in ["pretokenized", "padded"] {
            let rows = read(&fixture(&format!("{name}.parquet")), "input_ids").unwrap();
            let ids: Vec<Value> = rows.into_iter().map(|row| row.unwrap()).map(unpadded).collect();
            assert_eq!(Value::Array(ids), expected[name], "{name}");
        }
    }

    /// Returns a cell's token ids without padding.
    fn unpadded(cell: Cell) -> Value {
        let ids = cell.value.as_array().unwrap().iter();
        let Some(mask) = cell.mask else { return ids.cloned().collect() };
        ids.zip(mask.as_array().unwrap()).filter(|(_, text)| **text == 1).map(|(id, _)| id.clone()).collect()
    }

    #[test]
    fn a_nested_column_is_named_with_a_dot() {
        let rows = read(&fixture("nested.parquet"), "translation.en").unwrap();
        let texts: Vec<_> = rows.into_iter().map(|row| row.unwrap().value).collect();
        assert_eq!(texts, ["one 0", "one 1", "one 2", "one 3"]);
        let rows = read(&fixture("nested.parquet"), "translation.ids.input_ids").unwrap();
        let first = rows.into_iter().next().unwrap().unwrap();
        assert_eq!(unpadded(first), serde_json::json!([5, 6, 7]));
        let error = InputError::take(open(&fixture("nested.parquet"), "translation.fr").err().unwrap()).unwrap();
        let help = "its columns of strings and lists are: translation.en, translation.de, translation.ids.input_ids";
        assert!(error.to_string().contains(help), "{error}");
    }

    #[test]
    fn a_column_that_is_not_utf_8_makes_the_file_unreadable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let schema = Arc::new(parse_message_type("message m { required byte_array text; }").unwrap());
        let mut writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, Default::default()).unwrap();
        let mut rows = writer.next_row_group().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        let texts = [&b"one"[..], b"na\xefve", b"three"].map(|text| ByteArray::from(text.to_vec()));
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        rows.close().unwrap();
        writer.close().unwrap();
        let mut rows = open(&path, "text").unwrap();
        assert_eq!(rows.next_row().unwrap().unwrap().unwrap().value, "one");
        let why = rows.next_row().err().unwrap().to_string();
        assert!(why.contains("a.parquet: column `text` has bytes that are not UTF-8"), "{why}");
        assert!(rows.next_row().unwrap().is_none());
    }

    #[test]
    fn a_missing_column_or_a_damaged_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        write(&path, Compression::SNAPPY);
        for column in ["txt", "n"] {
            let error = open(&path, column).err().unwrap();
            assert!(error.to_string().contains(&format!("no column `{column}` of strings or lists")), "{error}");
        }
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = open(&path, "text").err().unwrap();
        assert!(error.to_string().contains("not a valid parquet file"), "{error}");
    }
}
