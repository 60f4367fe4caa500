use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::write::serialize;
use super::{Value, read, read_bytes};
use crate::error::InputError;

/// Files that Python wrote; see make.py in their folder.
const FIXTURES: [(&str, &[u8]); 7] = [
    ("state_dict.pt", include_bytes!("../../../../tests/fixtures/torch_file/state_dict.pt")),
    ("backup.pt", include_bytes!("../../../../tests/fixtures/torch_file/backup.pt")),
    ("backup_protocol_5.pt", include_bytes!("../../../../tests/fixtures/torch_file/backup_protocol_5.pt")),
    ("hostile.pt", include_bytes!("../../../../tests/fixtures/torch_file/hostile.pt")),
    ("module.pt", include_bytes!("../../../../tests/fixtures/torch_file/module.pt")),
    ("legacy.pt", include_bytes!("../../../../tests/fixtures/torch_file/legacy.pt")),
    ("no_checksums.pt", include_bytes!("../../../../tests/fixtures/torch_file/no_checksums.pt")),
];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/torch_file").join(name)
}

/// Returns message and help of an error, which must be an input error.
fn refusal(read: anyhow::Result<Value>) -> String {
    read.unwrap_err().downcast::<InputError>().expect("an input error").to_string()
}

fn assert_tensor(tensor: &Tensor, expected: &Tensor) {
    assert_eq!(tensor.kind(), expected.kind());
    assert_eq!(tensor.size(), expected.size());
    assert!(tensor.is_contiguous());
    assert!(tensor.equal(expected), "{tensor} {expected}");
}

// Round trip.

#[test]
fn written_tensors_are_read_back() {
    let kinds = [
        Kind::Float,
        Kind::Double,
        Kind::Half,
        Kind::BFloat16,
        Kind::Int64,
        Kind::Int,
        Kind::Int16,
        Kind::Int8,
        Kind::Uint8,
        Kind::Bool,
    ];
    let mut tensors: BTreeMap<String, Tensor> = kinds
        .iter()
        .map(|kind| (format!("{kind:?}"), Tensor::from_slice2(&[[0.0f32, 1.0, 2.0], [3.0, 0.0, 5.0]]).to_kind(*kind)))
        .collect();
    tensors.insert("scalar".to_owned(), Tensor::from(-5_i64));
    tensors.insert("empty".to_owned(), Tensor::zeros([0, 3], (Kind::Float, tch::Device::Cpu)));
    tensors.insert("transposed".to_owned(), Tensor::from_slice2(&[[1.0f32, 2.0], [3.0, 4.0]]).tr());
    let list: Vec<(&str, Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.shallow_clone())).collect();

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ae.pt");
    super::write(&path, &list).unwrap();
    let read = read(&path).unwrap().state_dict().unwrap();
    assert_eq!(read.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
    read.iter().for_each(|(name, tensor)| assert_tensor(tensor, &tensors[name]));
}

// Files from Python.

#[test]
fn python_state_dict_is_read() {
    let read = read(&path("state_dict.pt")).unwrap();
    let order: Vec<&str> = read.as_dict().unwrap().iter().map(|(key, _)| key.as_str().unwrap()).collect();
    assert_eq!(order[..3], ["transposed", "permuted", "front"]);
    let state = read.state_dict().unwrap();
    let arange = |n: i64, kind| Tensor::arange(n, (kind, tch::Device::Cpu));
    assert_tensor(&state["transposed"], &arange(6, Kind::Float).reshape([2, 3]).tr().contiguous());
    assert_tensor(&state["permuted"], &arange(24, Kind::Int16).reshape([2, 3, 4]).permute([1, 2, 0]).contiguous());
    assert_tensor(&state["front"], &arange(4, Kind::Float));
    assert_tensor(&state["columns"], &Tensor::from_slice2(&[[1.0f32, 2.0], [5.0, 6.0], [9.0, 10.0]]));
    assert_tensor(&state["every_other"], &Tensor::from_slice(&[1.0f32, 3.0, 5.0, 7.0, 9.0, 11.0]));
    assert_tensor(&state["expanded"], &Tensor::from_slice2(&[[1.5f32, 1.5, 1.5], [2.5, 2.5, 2.5]]));
    assert_tensor(&state["parameter"], &Tensor::from_slice(&[0.25f32, -0.5]));
    assert_tensor(&state["scalar"], &Tensor::from(7_i64));
    assert_tensor(&state["empty"], &Tensor::zeros([0, 3], (Kind::Float, tch::Device::Cpu)));
    for (name, kind) in [("f64", Kind::Double), ("f16", Kind::Half), ("bf16", Kind::BFloat16), ("i32", Kind::Int)] {
        assert_tensor(&state[name], &Tensor::from_slice(&[1.0f32, -2.0]).to_kind(kind));
    }
    assert_tensor(&state["i16"], &Tensor::from_slice(&[1_i16, -2]));
    assert_tensor(&state["i8"], &Tensor::from_slice(&[1_i8, -2]));
    assert_tensor(&state["u8"], &Tensor::from_slice(&[1_u8, 254]));
    assert_tensor(&state["bool"], &Tensor::from_slice(&[true, false]));
    assert!(!state["parameter"].requires_grad());
}

#[test]
fn python_training_backup_is_read() {
    for name in ["backup.pt", "backup_protocol_5.pt"] {
        let backup = read(&path(name)).unwrap();
        let at = |keys: &[&str]| keys.iter().fold(&backup, |value, key| value.get(key).unwrap());
        assert_eq!(at(&["step"]).as_i64(), Some(1000));
        assert!(backup.state_dict().is_none());
        assert!(backup.get("absent").is_none());
        assert!(at(&["step"]).get("absent").is_none());

        let state = at(&["ae"]).state_dict().unwrap();
        assert_eq!(state.keys().collect::<Vec<_>>(), ["bias", "weight"]);
        assert_tensor(&state["weight"], &Tensor::from_slice2(&[[0.0f32, 1.0, 2.0], [3.0, 4.0, 5.0]]));

        let optimizer = at(&["optimizer", "state"]).as_dict().unwrap();
        assert_eq!(optimizer.iter().map(|(key, _)| key.as_i64().unwrap()).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(optimizer[0].1.get("step").unwrap().as_i64(), Some(1));
        assert_eq!(optimizer[0].1.get("exp_avg").unwrap().as_tensor().unwrap().size(), [2, 3]);
        let group = &at(&["optimizer", "param_groups"]).as_list().unwrap()[0];
        assert_eq!(group.get("lr").unwrap().as_f64(), Some(1e-3));
        assert_eq!(group.get("amsgrad").unwrap().as_bool(), Some(false));
        assert_eq!(group.get("params").unwrap().as_list().unwrap().len(), 2);

        let trainer = at(&["config", "trainer"]);
        assert_eq!(trainer.get("betas").unwrap().as_list().unwrap()[1].as_f64(), Some(0.999));
        assert!(matches!(trainer.get("steps"), Some(Value::None)));
        assert_eq!(trainer.get("seed").unwrap().as_i64(), Some(1 << 40));
        assert_eq!(trainer.get("negative").unwrap().as_i64(), Some(-(1 << 40)));
        let name = |key| match at(&["config", key]) {
            Value::Name(name) => name.as_str(),
            other => panic!("{other:?}"),
        };
        assert_eq!((name("device"), name("cpu"), name("dtype")), ("cuda:0", "cpu", "torch.float32"));
        assert_eq!(at(&["config", "device"]).as_str(), None);
        assert_eq!(at(&["config", "size"]).as_list().unwrap()[1].as_i64(), Some(3));
        assert_eq!(at(&["config", "layers"]).as_list().unwrap()[0].as_i64(), Some(3));
        assert_eq!(at(&["config", "use"]).as_bool(), Some(true));
        assert_eq!(at(&["config", "counts", "a"]).as_i64(), Some(1));
        assert_eq!(at(&["config", "text"]).as_str(), Some("a line\nand a snowman ☃"));
        assert!(matches!(at(&["config", "bytes"]), Value::Bytes(bytes) if bytes == b"\x00\xff"));

        assert_eq!(at(&["norm_factor"]).as_f64(), Some(1.25));
        let numpy = at(&["numpy"]).as_list().unwrap();
        assert_eq!(numpy[0].as_f64(), Some(0.5));
        assert_eq!(numpy[1].as_i64(), Some(-3));
        assert_eq!(numpy[2].as_i64(), Some(4));
        assert_eq!(numpy[3].as_bool(), Some(true));
        assert_eq!(at(&["mean"]).as_f64(), Some(0.75));
        assert_eq!(at(&["mean"]).as_i64(), None);
    }
}

#[test]
fn file_without_checksums_is_read() {
    let state = read(&path("no_checksums.pt")).unwrap().state_dict().unwrap();
    assert_tensor(&state["weight"], &Tensor::from_slice(&[1.0f32, 1.0]));
}

// Files that are not weights.

#[test]
fn pickle_that_calls_code_is_refused() {
    let message = refusal(read(&path("hostile.pt")));
    assert!(
        message.contains(
            "hostile.pt wants to call `posix.system`, which a weights file does not need; none of its code was run\n\
             help: save the state dict alone: torch.save(model.state_dict(), path)"
        ),
        "{message}"
    );
    assert!(!Path::new("/tmp/dictlearn-was-here").exists());
    let message = refusal(read(&path("module.pt")));
    assert!(message.contains("module.pt wants to call `torch.nn.modules.linear.Linear`"), "{message}");
    assert!(message.contains("save the state dict alone"), "{message}");
    // The other pickle instructions that name a global.
    for pickle in [
        b"(S'true'\niposix\nsystem\n.".as_slice(),
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85\x81.",
        b"c__builtin__\neval\n.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch.storage\n_load_from_bytes\n.",
    ] {
        let message = refusal(unpickle(pickle, &[]));
        assert!(message.contains("wants to call `"), "{message}");
    }
}

#[test]
fn control_characters_in_names_are_escaped() {
    let message = refusal(unpickle(format!("cevil\n\x1b[2J{}\n.", "x".repeat(1000)).as_bytes(), &[]));
    assert!(message.contains("`evil.\\u{1b}[2Jxxx"), "{message}");
    assert!(message.len() < 400, "{message}");
}

#[test]
fn other_formats_are_refused_by_name() {
    let message = refusal(read(&path("legacy.pt")));
    assert!(
        message.contains("legacy.pt is in the format of PyTorch before 1.6, which is not supported\nhelp: load it and")
    );
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    assert!(refusal(read_bytes("a.pt", &tar)).contains("a.pt is in the tar format"));
    for bytes in [b"".as_slice(), b"PK", b"{}", b"\x80\x02}."] {
        assert_eq!(refusal(read_bytes("a.pt", bytes)), "a.pt is not a torch.save file: it is not a zip archive");
    }
    let message = refusal(read_bytes("a.pt", &archive(&[("a/weights.npy", b"")])));
    assert_eq!(message, "a.pt is not a torch.save file: it has no `data.pkl`");
    let message = refusal(read_bytes("a.pt", &archive(&[("a/data.pkl", b"N."), ("a/byteorder", b"big")])));
    assert!(message.contains("big-endian"), "{message}");
    assert!(refusal(unpickle(b"ctorch\nComplexFloatStorage\n.", &[])).contains("ComplexFloatStorage"));
    assert!(refusal(unpickle(b"ctorch._utils\n_rebuild_tensor_v3\n.", &[])).contains("float8"));

    let dir = tempfile::tempdir().unwrap();
    assert!(refusal(read(dir.path())).contains("is a folder"));
    assert!(refusal(read(&dir.path().join("absent.pt"))).contains("there is no file"));
    std::fs::write(dir.path().join("empty.pt"), b"").unwrap();
    assert!(refusal(read(&dir.path().join("empty.pt"))).contains("is not a torch.save file"));
}

// Hostile files.

/// Returns an archive like one of `torch.save`.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in entries {
        archive.start_file(*name, options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// Reads a pickle with storages named 0, 1 and so on.
fn unpickle(pickle: &[u8], storages: &[&[u8]]) -> anyhow::Result<Value> {
    let names: Vec<String> = (0..storages.len()).map(|index| format!("any folder/data/{index}")).collect();
    let mut entries = vec![("any folder/data.pkl", pickle)];
    entries.extend(names.iter().map(String::as_str).zip(storages.iter().copied()));
    read_bytes("a.pt", &archive(&entries))
}

fn long(value: i64) -> Vec<u8> {
    [b"\x8a\x08".as_slice(), &value.to_le_bytes()].concat()
}

/// Returns a pickle of one tensor in storage 0.
fn tensor(class: &str, elements: i64, offset: i64, sizes: &[i64], strides: &[i64]) -> Vec<u8> {
    let mut out = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n".to_vec();
    out.extend(format!("{class}\nX\x01\0\0\x000X\x03\0\0\0cpu").bytes());
    out.extend(long(elements));
    out.extend(b"tQ");
    out.extend(long(offset));
    for list in [sizes, strides] {
        out.push(b'(');
        list.iter().for_each(|value| out.extend(long(*value)));
        out.push(b't');
    }
    out.extend(b"\x89NtR.");
    out
}

#[test]
fn tensor_outside_its_storage_is_refused() {
    const MAX: i64 = i64::MAX;
    let data: Vec<u8> = (0..4_u8).flat_map(|value| f32::from(value).to_le_bytes()).collect();
    let read = |elements, offset, sizes: &[i64], strides: &[i64]| {
        unpickle(&tensor("FloatStorage", elements, offset, sizes, strides), &[&data])
    };
    let good = |elements, offset, sizes: &[i64], strides: &[i64], expected: &[f32]| {
        let value = read(elements, offset, sizes, strides).unwrap();
        assert_tensor(value.as_tensor().unwrap(), &Tensor::from_slice(expected).reshape(sizes));
    };
    good(4, 0, &[2, 2], &[2, 1], &[0.0, 1.0, 2.0, 3.0]);
    good(4, 0, &[2, 2], &[1, 2], &[0.0, 2.0, 1.0, 3.0]);
    good(4, 1, &[2], &[2], &[1.0, 3.0]);
    good(4, 1, &[2, 2], &[1, 1], &[1.0, 2.0, 2.0, 3.0]);
    good(4, 3, &[], &[], &[3.0]);
    good(4, 2, &[2, 1, 2], &[0, MAX, 1], &[2.0, 3.0, 2.0, 3.0]);
    good(4, 2, &[2, 2], &[0, 0], &[2.0; 4]);
    good(2, 0, &[2], &[1], &[0.0, 1.0]);
    good(4, MAX, &[0, 2], &[MAX, 1], &[]);
    good(0, 0, &[0], &[1], &[]);
    for (elements, offset, sizes, strides) in [
        (4, 0, [5].as_slice(), [1].as_slice()),
        (4, 1, &[4], &[1]),
        (4, 4, &[], &[]),
        (4, 0, &[2, 2], &[3, 1]),
        (4, 0, &[3], &[2]),
        (2, 0, &[4], &[1]),
        (5, 0, &[5], &[1]),
        (MAX, 0, &[4], &[1]),
        (MAX, MAX, &[4], &[1]),
        (MAX, 4, &[], &[]),
        (-1, 0, &[1], &[1]),
        (4, -1, &[1], &[1]),
        (4, 0, &[-1], &[1]),
        (4, 3, &[2], &[-1]),
        (4, 0, &[MAX], &[0]),
        (4, 0, &[MAX, MAX], &[0, 0]),
        (4, 0, &[1 << 32, 1 << 32], &[0, 0]),
        (4, 0, &[0, MAX], &[1, 1]),
        (4, 0, &[MAX, 0, MAX], &[1, 1, 1]),
        (4, 0, &[2], &[MAX]),
        (4, 0, &[3, 3], &[MAX / 2, MAX / 2]),
        (4, 0, &[2, 2], &[1]),
        (4, 0, &[1; 65], &[1; 65]),
        // More memory than a small file may take: 64 MiB.
        (4, 0, &[1 << 12, (1 << 12) + 1], &[0, 0]),
    ] {
        let message = refusal(read(elements, offset, sizes, strides));
        assert!(message.starts_with("a.pt "), "{message}");
    }
    good(4, 0, &[1 << 10, 1 << 10], &[0, 0], &vec![0.0; 1 << 20]);
    let missing = unpickle(&tensor("FloatStorage", 4, 0, &[4], &[1]), &[]);
    assert_eq!(refusal(missing), "a.pt is damaged: it has no storage `0`");
}

#[test]
fn boolean_bytes_are_normalised_to_0_or_1() {
    let value = unpickle(&tensor("BoolStorage", 3, 0, &[3], &[1]), &[&[0, 1, 7]]).unwrap();
    assert_tensor(value.as_tensor().unwrap(), &Tensor::from_slice(&[false, true, true]));
}

#[test]
fn values_that_expand_without_bound_are_refused() {
    // Thirty levels of lists, each of ten times the previous list.
    let mut laughs = b"\x80\x02]q\0".to_vec();
    for level in 0..30_u8 {
        laughs.extend([b'0', b']', b'q', level + 1, b'(']);
        (0..10).for_each(|_| laughs.extend([b'h', level]));
        laughs.push(b'e');
    }
    laughs.push(b'.');
    assert!(refusal(unpickle(&laughs, &[])).contains("far more memory"));

    // A container in itself, once and many times.
    assert!(refusal(unpickle(b"]q\0h\0a.", &[])).contains("in themselves"));
    assert!(refusal(unpickle(b"]q\0(h\0h\0h\0h\0e.", &[])).contains("in themselves"));
    assert!(refusal(unpickle(b"}q\0K\x01h\0s.", &[])).contains("in themselves"));
    // A million nested lists, tuples and dicts.
    for (before, after) in [("]", "a"), ("", "\u{85}"), ("}K\x01", "s")] {
        let byte = |text: &str| text.chars().map(|char| char as u8).collect::<Vec<_>>().repeat(1 << 20);
        let nest = [byte(before), b"N".to_vec(), byte(after), b".".to_vec()].concat();
        let message = refusal(unpickle(&nest, &[]));
        assert!(message.contains("in themselves"), "{message}");
    }

    // A long string and a tensor repeated many times, and a list copied many times.
    let text = [b"X\0\0\x10\0".as_slice(), &[b'a'; 1 << 20], b"q\x000](", &b"h\0".repeat(1 << 10), b"e."].concat();
    assert!(refusal(unpickle(&text, &[])).contains("far more memory"));
    let mut tensors = tensor("FloatStorage", 1, 0, &[1], &[1]);
    tensors.pop();
    tensors.extend([b"q\x000](".as_slice(), &b"h\0".repeat(1 << 20), b"e."].concat());
    assert!(refusal(unpickle(&tensors, &[&[0; 4]])).contains("far more memory"));
    let copies =
        [b"(".as_slice(), &[b'N'; 1 << 20], b"lq\x00cbuiltins\nlist\nq\x01", &b"h\x01h\0\x85R".repeat(1000), b"."];
    assert!(refusal(unpickle(&copies.concat(), &[])).contains("too long for a weights file"));
    assert!(refusal(unpickle(&b"N".repeat(9 << 20), &[])).contains("too long for a weights file"));

    // Lengths beyond the end of the pickle.
    for length in [
        b"X\xff\xff\xff\xff".as_slice(),
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"B\xff\xff\xff\xff",
        b"\x8b\x08\0\0\0",
    ] {
        assert_eq!(refusal(unpickle(length, &[])), "a.pt is damaged: its pickle ends early");
    }
    assert!(refusal(unpickle(b"\x8b\xff\xff\xff\xff.", &[])).contains("more than 64 bits"));
}

#[test]
fn entry_that_contradicts_the_directory_is_refused() {
    let good = archive(&[("a/data.pkl", b"X\x05\0\0\0hello.")]);
    assert_eq!(read_bytes("a.pt", &good).unwrap().as_str(), Some("hello"));
    let place = good.windows(5).position(|window| window == b"hello").unwrap();
    let mut other = good.clone();
    other[place] = b'j';
    assert!(refusal(read_bytes("a.pt", &other)).contains("checksum"));

    let directory = good.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    // Fields of the directory: compressed size at 20, uncompressed size at 24, method at 10.
    for (at, bytes) in [(20, [0xfe; 4]), (24, [0xfe; 4]), (10, [8, 0, 0, 0])] {
        let mut other = good.clone();
        other[directory + at..directory + at + bytes.len()].copy_from_slice(&bytes);
        refusal(read_bytes("a.pt", &other));
    }
    let mut both = good.clone();
    both[directory + 20..directory + 28].copy_from_slice(&[0xfe; 8]);
    refusal(read_bytes("a.pt", &both));
}

#[test]
fn overlapping_entries_are_refused() {
    // Ten storages that the directory places where the first one is.
    let data = vec![0; 4096];
    let names: Vec<String> = (0..10).map(|index| format!("a/data/{index}")).collect();
    let one = tensor("FloatStorage", 1, 0, &[], &[]);
    let mut pickle = b"(".to_vec();
    for index in b'0'..=b'9' {
        let key = one.windows(6).position(|window| window == b"X\x01\0\0\x000").unwrap() + 5;
        pickle.extend([&one[..key], &[index], &one[key + 1..one.len() - 1]].concat());
    }
    pickle.extend(b"t.");
    let mut entries: Vec<(&str, &[u8])> = vec![("a/data.pkl", &pickle), (&names[0], &data)];
    entries.extend(names[1..].iter().map(|name| (name.as_str(), [].as_slice())));
    let mut bytes = archive(&entries);
    let headers: Vec<usize> = (0..bytes.len() - 4).filter(|at| bytes[*at..].starts_with(b"PK\x01\x02")).collect();
    for part in [16..28, 42..46] {
        let first = bytes[headers[1] + part.start..headers[1] + part.end].to_vec();
        headers[2..].iter().for_each(|at| bytes[at + part.start..at + part.end].copy_from_slice(&first));
    }
    let message = refusal(read_bytes("a.pt", &bytes));
    assert!(message.contains("overlaps another"), "{message}");
}

#[test]
fn protocol_0_is_read() {
    let value = unpickle(b"(dp0\nVa\np1\n(lp2\nI1\naI01\naL5L\naF1.5\nag1\nasS'b'\nNs.", &[]).unwrap();
    let list = value.get("a").unwrap().as_list().unwrap();
    assert_eq!((list[0].as_i64(), list[1].as_bool(), list[2].as_i64()), (Some(1), Some(true), Some(5)));
    assert_eq!((list[3].as_f64(), list[4].as_str()), (Some(1.5), Some("a")));
    assert!(matches!(value.get("b"), Some(Value::None)));
}

#[test]
fn later_of_two_equal_keys_counts() {
    let value = unpickle(b"}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u.", &[]).unwrap();
    assert_eq!(value.get("a").unwrap().as_i64(), Some(2));
}

// Damaged files must not panic.

/// Reads arbitrary bytes. True for a value; otherwise the result must be an input error that names the file.
fn survives(what: &str, bytes: &[u8]) -> bool {
    match catch_unwind(|| read_bytes("a.pt", bytes)) {
        Ok(Ok(value)) => {
            drop(format!("{value:?}"));
            true
        }
        Ok(Err(error)) => {
            let error = error.downcast::<InputError>().unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(error.message().starts_with("a.pt "), "{what}: {error}");
            false
        }
        Err(_) => panic!("{what} panics: {bytes:02x?}"),
    }
}

#[test]
fn truncations_and_changed_bytes_do_not_panic() {
    for (name, bytes) in FIXTURES {
        for length in 0..bytes.len() {
            assert!(!survives(&format!("{name} of {length} bytes"), &bytes[..length]));
        }
        let mut changed = bytes.to_vec();
        for place in 0..bytes.len() {
            for value in [bytes[place] ^ 1, bytes[place] ^ 0x80, 0xff] {
                changed[place] = value;
                survives(&format!("{name} with {value} at {place}"), &changed);
            }
            changed[place] = bytes[place];
        }
    }
}

/// Returns the entries of a fixture.
fn entries(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut zip = ZipArchive::new(Cursor::new(bytes)).unwrap();
    let count = zip.len();
    let entry = |index| {
        let mut file = zip.by_index_raw(index).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        (file.name().unwrap().into_owned(), bytes)
    };
    (0..count).map(entry).collect()
}

#[test]
fn changed_pickle_bytes_do_not_panic() {
    let state = serialize(&[("bias", Tensor::from_slice(&[1.0f32])), ("steps", Tensor::from(3_i64))]).unwrap();
    for (name, bytes) in [("written.pt", state.as_slice()), FIXTURES[6]] {
        let mut entries = entries(bytes);
        let pickle = entries.iter().position(|(name, _)| name.ends_with("data.pkl")).unwrap();
        for place in 0..entries[pickle].1.len() {
            let before = entries[pickle].1[place];
            for value in 0..=255 {
                entries[pickle].1[place] = value;
                let list: Vec<(&str, &[u8])> =
                    entries.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
                survives(&format!("{name} with {value} at {place} of its pickle"), &archive(&list));
            }
            entries[pickle].1[place] = before;
        }
    }
}

#[test]
fn random_pickle_changes_do_not_panic() {
    // Instructions, and extreme lengths and numbers.
    const BYTES: &[u8] = b"\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8f\x90\x91\x93\x94\x95\0\x01\xff\x7f\n\
        ().0123NIJKMLFGXVSUTCB]}tldaesupqrghjcRibQ";
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let originals: Vec<_> =
        FIXTURES.iter().filter(|(name, _)| *name != "legacy.pt").map(|(_, it)| entries(it)).collect();
    let pickles: Vec<&[u8]> =
        originals.iter().flatten().filter(|(name, _)| name.ends_with("data.pkl")).map(|(_, it)| &it[..]).collect();
    let mut read = 0;
    for round in 0..ROUNDS {
        let original = &originals[rng.random_range(0..originals.len())];
        let mut pickle = original.iter().find(|(name, _)| name.ends_with("data.pkl")).unwrap().1.clone();
        for _ in 0..rng.random_range(1..6) {
            let place = rng.random_range(0..pickle.len());
            let length = rng.random_range(0..8.min(pickle.len() - place + 1));
            match rng.random_range(0..6) {
                0 => pickle[place] = rng.random(),
                1 => pickle[place] = BYTES[rng.random_range(0..BYTES.len())],
                2 => pickle[place..place + length].fill(rng.random()),
                3 => pickle.insert(place, BYTES[rng.random_range(0..BYTES.len())]),
                4 if pickle.len() > length + 1 => drop(pickle.drain(place..place + length)),
                _ => {
                    let other = pickles[rng.random_range(0..pickles.len())];
                    let from = rng.random_range(0..other.len());
                    let to = (from + rng.random_range(0..64)).min(other.len());
                    drop(pickle.splice(place..place + length, other[from..to].iter().copied()));
                }
            }
        }
        let list: Vec<(&str, &[u8])> = original
            .iter()
            .map(|(name, bytes)| (name.as_str(), if name.ends_with("data.pkl") { &pickle } else { &bytes[..] }))
            .collect();
        read += usize::from(survives(&format!("round {round}"), &archive(&list)));
    }
    // Otherwise only the first instructions were exercised.
    assert!(read > ROUNDS / 100, "{read}");
}

const ROUNDS: usize = 10_000;
