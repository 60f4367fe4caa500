//! The values of one column of a .parquet file, row group by row group.

use std::fs::File;
use std::sync::Arc;

use dictlearn_core::prelude::*;
use parquet::basic::Type as Physical;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::Field;
use parquet::schema::types::Type;

/// The values of a column: strings, or lists of messages. After a row that cannot be read there are none.
pub struct Rows {
    rows: RowIter<'static>,
    broken: bool,
}

impl Rows {
    /// Opens a file at the column of that name.
    pub fn open(name: &str, file: File, column: &str) -> Result<Self> {
        let refused = |error: parquet::errors::ParquetError| {
            InputError::new(format!("{name} is not a whole parquet file: {error}"))
        };
        let reader = SerializedFileReader::new(file).map_err(refused)?;
        let schema = reader.metadata().file_metadata().schema();
        let strings = |column: &&Arc<Type>| column.is_group() || column.get_physical_type() == Physical::BYTE_ARRAY;
        let columns = schema.get_fields();
        let Some(found) = columns.iter().filter(strings).find(|known| known.name() == column) else {
            let known: Vec<&str> = columns.iter().filter(strings).map(|column| column.name()).collect();
            bail!(InputError::new(format!("{name} has no column `{column}` of strings")).field("column").help(
                match known.is_empty() {
                    true => "it has no column of strings at all".to_owned(),
                    false => format!("its columns of strings are: {}", known.join(", ")),
                }
            ));
        };
        let only = Type::group_type_builder(schema.name()).with_fields(vec![found.clone()]).build().map_err(refused)?;
        let rows = RowIter::from_file_into(Box::new(reader)).project(Some(only)).map_err(refused)?;
        Ok(Rows { rows, broken: false })
    }
}

impl Iterator for Rows {
    type Item = std::result::Result<Value, String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.broken {
            return None;
        }
        let row = match self.rows.next()? {
            Ok(row) => row,
            Err(error) => {
                self.broken = true;
                return Some(Err(format!("the file is damaged or breaks off: {error}")));
            }
        };
        let field = row.get_column_iter().next().map(|(_, field)| field.clone());
        Some(match field {
            Some(Field::Str(text)) => Ok(text.into()),
            // A file may not say that its bytes are text.
            Some(Field::Bytes(bytes)) => match String::from_utf8(bytes.data().to_vec()) {
                Ok(text) => Ok(text.into()),
                Err(_) => Err("not UTF-8".to_owned()),
            },
            Some(list @ (Field::ListInternal(_) | Field::Group(_))) => Ok(list.to_json_value()),
            _ => Err("no text in this row".to_owned()),
        })
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

    /// Two row groups of a number and a text, every third text missing.
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

    #[test]
    fn the_column_is_read_through_all_row_groups() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())] {
            write(&path, compression);
            let rows: Vec<_> = Rows::open("a.parquet", File::open(&path).unwrap(), "text").unwrap().collect();
            let texts: Vec<_> = rows.iter().flatten().filter_map(Value::as_str).collect();
            assert_eq!(texts, ["text 0.0", "text 0.1", "text 1.0", "text 1.1"], "{compression}");
            assert_eq!(rows.len() - texts.len(), 2, "rows without text");
        }
    }

    #[test]
    fn another_column_or_a_damaged_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        write(&path, Compression::SNAPPY);
        for column in ["txt", "n"] {
            let error = Rows::open("a.parquet", File::open(&path).unwrap(), column).err().unwrap();
            assert!(error.to_string().contains(&format!("no column `{column}` of strings")), "{error}");
        }
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = Rows::open("a.parquet", File::open(&path).unwrap(), "text").err().unwrap();
        assert!(error.to_string().contains("not a whole parquet file"), "{error}");
    }
}
