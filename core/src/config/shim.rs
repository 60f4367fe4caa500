//! temporary
use super::*;
use std::path::PathBuf;
pub struct Sources { pub file: Option<PathBuf>, pub profile: Option<String>, pub set: Vec<String>, pub variables: Vec<(String,String)> }
pub struct Loaded { pub config: RunConfig }
pub fn load(s: &Sources) -> Result<Loaded, InputError> { Ok(Loaded { config: serde_yaml::from_str(&std::fs::read_to_string(s.file.as_ref().unwrap()).unwrap()).unwrap() }) }
pub fn variables() -> Vec<(String,String)> { vec![] }
pub fn schema() -> serde_json::Value { schemars::schema_for!(RunConfig).to_value() }
pub fn to_yaml(c: &RunConfig) -> anyhow::Result<String> { Ok(serde_yaml::to_string(c)?) }
pub fn type_name(_: &serde_json::Value) -> String { String::new() }
