//! Trains a small GPT-NeoX language model and its tokenizer on a folder of texts, one of them held out. It made the
//! bundled model `embedded:austen` from six public-domain novels by Jane Austen:
//!
//! ```sh
//! cargo run --release -p train_tiny_lm -- --data NOVELS --held-out persuasion --out plugins/embedded-austen
//! ```
//!
//! `NOVELS` holds one Project Gutenberg .txt file per novel, without its header and footer. The program writes a model
//! in Hugging Face's layout to `OUT/model`, with a model card that reports the measured losses. It writes the texts to
//! `OUT/text`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use dictlearn_core::files::tensors;
use dictlearn_core::lm::{Decoder, ModelCx, Rope, open_model};
use dictlearn_core::lm::{Hooks, LanguageModel, Tokens, cross_entropy};
use dictlearn_core::machine::device::Precision;
use dictlearn_core::machine::rng::rng;
use dictlearn_core::train::{Adam, AdamConfig};
use dictlearn_model_gpt_neox::{GptNeoxConfig, random};
use rand::Rng;
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, NormalizerWrapper, PostProcessorWrapper, Tokenizer, TokenizerImpl};

const END_OF_TEXT: &str = "<|endoftext|>";
const SEED: u64 = 1817;

/// Trains a small GPT-NeoX and its tokenizer on a folder of texts.
#[derive(Debug, Parser)]
struct Args {
    /// Folder of .txt files.
    #[arg(long)]
    data: PathBuf,
    /// File (without .txt) to hold out from training and evaluate on.
    #[arg(long)]
    held_out: String,
    /// Training files (without .txt) to ship with the model as text for SAEs.
    #[arg(long, value_delimiter = ',', default_value = "emma,prideprejudice")]
    ship: Vec<String>,
    /// Output folder for `model/` and `text/`.
    #[arg(long)]
    out: PathBuf,
    /// Number of token ids.
    #[arg(long, default_value_t = 2048)]
    vocab_size: usize,
    /// Width of the residual stream.
    #[arg(long, default_value_t = 192)]
    hidden_size: i64,
    /// Number of layers.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Attention heads per layer.
    #[arg(long, default_value_t = 6)]
    heads: i64,
    /// Tokens per context.
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Contexts per batch.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Training steps.
    #[arg(long, default_value_t = 4000)]
    steps: u64,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Weight decay of the matrices.
    #[arg(long, default_value_t = 0.1)]
    weight_decay: f64,
    /// Compute products in bfloat16.
    #[arg(long)]
    bfloat16: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (model_dir, text_dir) = (args.out.join("model"), args.out.join("text"));
    fs::create_dir_all(&model_dir)?;
    fs::create_dir_all(&text_dir)?;

    let novels = read_novels(&args.data)?;
    let (held_out, train): (Vec<_>, Vec<_>) = novels.into_iter().partition(|(name, _)| *name == args.held_out);
    ensure!(!held_out.is_empty(), "{} has no {}.txt to hold out", args.data.display(), args.held_out);
    ensure!(!train.is_empty(), "{} has only the held-out text", args.data.display());
    let shipped: Vec<String> =
        train.iter().filter(|(name, _)| args.ship.contains(name)).flat_map(|(_, chapters)| chapters.clone()).collect();
    fs::write(text_dir.join("train.txt"), shipped.join("\n\n"))?;
    fs::write(text_dir.join("held_out.txt"), held_out[0].1.join("\n\n"))?;

    let tokenizer = train_tokenizer(&train, args.vocab_size)?;
    tokenizer.save(model_dir.join("tokenizer.json"), true).map_err(|error| anyhow::anyhow!(error))?;
    let train_tokens = encode(&tokenizer, &train)?;
    let held_out_tokens = encode(&tokenizer, &held_out)?;
    let unigram = unigram_loss(&train_tokens, &held_out_tokens, args.vocab_size);
    println!("{} training tokens, {} held out, unigram {unigram:.4}", train_tokens.len(), held_out_tokens.len());

    let config = GptNeoxConfig {
        vocab_size: args.vocab_size as i64,
        hidden_size: args.hidden_size,
        num_hidden_layers: args.layers,
        num_attention_heads: args.heads,
        intermediate_size: 4 * args.hidden_size,
        max_position_embeddings: args.context as i64,
        hidden_act: "gelu".to_owned(),
        layer_norm_eps: 1e-5,
        rotary_pct: 0.25,
        rotary_emb_base: 10_000.0,
        rope: Rope::default(),
        use_parallel_residual: true,
        attention_bias: true,
        tie_word_embeddings: true,
    };
    tch::manual_seed(SEED as i64);
    let precision = if args.bfloat16 { Precision::BFloat16 } else { Precision::Float32 };
    let model = random(&config, &ModelCx::new(Device::cuda_if_available(), precision))?;
    train_model(&args, &model, &train_tokens, &held_out_tokens)?;

    save(&model, &config, &model_dir)?;
    // Measure the half-precision weights that are shipped.
    let (saved, _) = open_model(&model_dir.to_string_lossy(), Device::cuda_if_available(), Precision::Float32)?;
    let loss = held_out_loss(&*saved, &held_out_tokens, args.context);
    let parameters: usize = saved.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
    println!("held-out loss {loss:.4}, {:.4} below the unigram model's", unigram - loss);
    let train_names: Vec<&str> = train.iter().map(|(name, _)| name.as_str()).collect();
    let card = format!(
        "# A small language model of Jane Austen\n\n\
         A GPT-NeoX of {parameters} parameters with a byte-level BPE of {} tokens, trained by `examples/train_tiny_lm` \
         for {} steps of {} tokens on {} tokens of {} (public domain), with {} held out.\n\n\
         | held-out loss, nats per token ({} tokens) | |\n| --- | --- |\n\
         | this model (half-precision weights) | {loss:.4} |\n\
         | unigram model of the training tokens, add-one smoothed | {unigram:.4} |\n\
         | difference | {:.4} |\n\n\
         Documents are chapters, joined with `{END_OF_TEXT}`, which is also the BOS and EOS token. Contexts of {} tokens.\n",
        args.vocab_size,
        args.steps,
        args.batch * args.context,
        train_tokens.len(),
        train_names.join(", "),
        args.held_out,
        held_out_tokens.len(),
        unigram - loss,
        args.context,
    );
    fs::write(model_dir.join("README.md"), card)?;
    Ok(())
}

/// The texts of a folder by name, each as its chapters: one paragraph a line, line breaks within it taken out.
fn read_novels(dir: &Path) -> Result<Vec<(String, Vec<String>)>> {
    let mut novels = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "txt") {
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            novels.push((name, chapters(&text)));
        }
    }
    novels.sort();
    if novels.is_empty() {
        bail!("{} holds no .txt files", dir.display());
    }
    Ok(novels)
}

fn chapters(text: &str) -> Vec<String> {
    let mut chapters: Vec<Vec<String>> = vec![Vec::new()];
    for paragraph in text.replace('\r', "").split("\n\n") {
        let paragraph = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
        let heading = paragraph.len() < 20 && paragraph.to_lowercase().starts_with("chapter");
        if heading {
            chapters.push(Vec::new());
        }
        if !paragraph.is_empty() {
            chapters.last_mut().expect("there is always one").push(paragraph);
        }
    }
    chapters.retain(|paragraphs| !paragraphs.is_empty());
    chapters.into_iter().map(|paragraphs| paragraphs.join("\n")).collect()
}

fn train_tokenizer(novels: &[(String, Vec<String>)], vocab_size: usize) -> Result<Tokenizer> {
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let byte_level = ByteLevel::new(false, true, true);
    type Parts = TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, PostProcessorWrapper, ByteLevel>;
    let mut tokenizer = Parts::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    let documents = novels.iter().flat_map(|(_, chapters)| chapters.iter());
    tokenizer.train(&mut trainer, documents).map_err(|error| anyhow::anyhow!(error))?;
    let json = tokenizer.to_string(false).map_err(|error| anyhow::anyhow!(error))?;
    json.parse().map_err(|error: tokenizers::Error| anyhow::anyhow!(error))
}

/// Returns all chapters as one row of token ids, with the end-of-text token before each.
fn encode(tokenizer: &Tokenizer, novels: &[(String, Vec<String>)]) -> Result<Vec<i64>> {
    let end = tokenizer.token_to_id(END_OF_TEXT).context("the tokenizer has no end-of-text token")?;
    let mut tokens = Vec::new();
    for chapter in novels.iter().flat_map(|(_, chapters)| chapters) {
        let encoding = tokenizer.encode(chapter.as_str(), false).map_err(|error| anyhow::anyhow!(error))?;
        tokens.push(i64::from(end));
        tokens.extend(encoding.get_ids().iter().map(|id| i64::from(*id)));
    }
    Ok(tokens)
}

/// Returns the mean loss on `held_out`, in nats per token, of an add-one smoothed unigram model of `train`.
fn unigram_loss(train: &[i64], held_out: &[i64], vocab_size: usize) -> f64 {
    let mut counts = vec![1.0_f64; vocab_size];
    train.iter().for_each(|token| counts[*token as usize] += 1.0);
    let total: f64 = counts.iter().sum();
    let loss: f64 = held_out.iter().map(|token| -(counts[*token as usize] / total).ln()).sum();
    loss / held_out.len() as f64
}

fn tokens(rows: &[&[i64]], device: Device) -> Tokens {
    let ids = Tensor::from_slice2(rows).to_device(device);
    let mask = ids.ones_like().to_kind(Kind::Bool);
    Tokens { ids, mask }
}

fn train_model(args: &Args, model: &Decoder, train: &[i64], held_out: &[i64]) -> Result<()> {
    let parameters = model.parameters();
    for (_, parameter) in &parameters {
        let _ = parameter.set_requires_grad(true);
    }
    let config = AdamConfig { betas: (0.9, 0.98), ..AdamConfig::default() };
    let mut adam = Adam::new(config, model.parameters());
    let mut gradients = adam.gradients();
    let mut rng = rng(SEED, "contexts");
    let warmup = args.steps.min(200);
    let started = Instant::now();
    let mut recent = 0.0;
    let model: &dyn LanguageModel = model;
    for step in 0..args.steps {
        let rows: Vec<&[i64]> = (0..args.batch)
            .map(|_| {
                let start = rng.random_range(0..train.len() - args.context);
                &train[start..start + args.context]
            })
            .collect();
        let tokens = tokens(&rows, model.device());
        let logits = model.forward(&tokens, &mut Hooks::none()).expect("nothing stops this pass");
        let length = args.context as i64 - 1;
        let logits = logits.narrow(1, 0, length).reshape([-1, args.vocab_size as i64]);
        let loss = logits.cross_entropy_for_logits(&tokens.ids.narrow(1, 1, length).reshape([-1]));
        gradients.backward(&loss)?;
        let lr = args.lr * ((step + 1) as f64 / warmup as f64).min(1.0) * {
            let done = step as f64 / args.steps as f64;
            0.5 * (1.0 + (std::f64::consts::PI * done).cos())
        };
        tch::no_grad(|| {
            let norms: Vec<Tensor> = gradients.iter().map(|(_, gradient)| gradient.norm()).collect();
            let factor = (Tensor::stack(&norms, 0).norm() + 1e-6).reciprocal().clamp_max(1.0);
            for (_, gradient) in gradients.iter() {
                let _ = gradient.shallow_clone().g_mul_(&factor);
            }
            for (_, parameter) in parameters.iter().filter(|(_, parameter)| parameter.dim() == 2) {
                let _ = parameter.shallow_clone().g_mul_scalar_(1.0 - lr * args.weight_decay);
            }
        });
        adam.step(lr, &gradients);
        recent = 0.98 * recent + 0.02 * loss.double_value(&[]);
        if step % 200 == 199 || step + 1 == args.steps {
            let rate = (step + 1) as f64 / started.elapsed().as_secs_f64();
            let smooth = recent / (1.0 - 0.98_f64.powi(step as i32 + 1));
            let held_out = if step % 1000 == 999 { held_out_loss(model, held_out, args.context) } else { f64::NAN };
            println!("step {}: loss {smooth:.4}, held out {held_out:.4}, {rate:.2} steps/s", step + 1);
        }
    }
    Ok(())
}

/// Returns the mean loss over consecutive contexts, in nats per token.
fn held_out_loss(model: &dyn LanguageModel, held_out: &[i64], context: usize) -> f64 {
    tch::no_grad(|| {
        let (mut sum, mut count) = (0.0, 0);
        let rows: Vec<&[i64]> = held_out.chunks_exact(context).collect();
        for rows in rows.chunks(16) {
            let tokens = tokens(rows, model.device());
            let logits = model.forward(&tokens, &mut Hooks::none()).expect("nothing stops this pass");
            let (loss, predicted) = cross_entropy(&logits, &tokens);
            sum += loss * predicted as f64;
            count += predicted;
        }
        sum / count as f64
    })
}

fn save(model: &Decoder, model_config: &GptNeoxConfig, dir: &Path) -> Result<()> {
    let weights: Vec<(String, Tensor)> =
        model.parameters().into_iter().map(|(name, tensor)| (name, tensor.detach().to_kind(Kind::Half))).collect();
    tensors::write(&dir.join("model.safetensors"), &weights)?;
    let mut config = serde_json::to_value(model_config)?;
    config["model_type"] = json!("gpt_neox");
    config["architectures"] = json!(["GPTNeoXForCausalLM"]);
    config["torch_dtype"] = json!("float16");
    config["bos_token_id"] = json!(0);
    config["eos_token_id"] = json!(0);
    fs::write(dir.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    let tokenizer = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": model_config.max_position_embeddings,
    });
    fs::write(dir.join("tokenizer_config.json"), serde_json::to_string_pretty(&tokenizer)?)?;
    Ok(())
}
