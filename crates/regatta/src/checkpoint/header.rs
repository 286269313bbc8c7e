//! The header of safetensors files, for files whose tensors are written one after the other.

use serde_json::{Map, Value, json};

/// The bytes of the header for f32 `tensors` (names and shapes) whose values follow without gaps.
pub(super) fn safetensors_header(
    metadata: &[(&str, &str)],
    tensors: impl Iterator<Item = (String, Vec<usize>)>,
) -> serde_json::Result<Vec<u8>> {
    let text = |(key, value): &(&str, &str)| (key.to_string(), Value::from(*value));
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), Value::Object(metadata.iter().map(text).collect()));
    let mut start = 0;
    for (name, shape) in tensors {
        let end = start + 4 * shape.iter().product::<usize>();
        entries.insert(name, json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }));
        start = end;
    }
    let mut json = serde_json::to_vec(&entries)?;
    // Values begin at a multiple of 8 bytes.
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
}
