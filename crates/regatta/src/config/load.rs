//! Reads a configuration: a TOML file and the changes by flags and environment variables.

use super::check::check;
use super::effects;
use super::reader::{Reader, unknown};
use super::schema::Config;
use super::sources::{Override, Sources, VARIABLES};
use crate::error::{Error, Result};
use regatta_plan::Plan;
use std::path::{Path, PathBuf};
use toml::Table;

const SECTIONS: [&str; 9] =
    ["model", "data", "train", "optimizer", "parallel", "compress", "local", "sync", "sample"];

impl Config {
    /// Reads `path` and applies `sets`, each `key.path=value` with a TOML value or a bare string.
    ///
    /// # Errors
    /// The file cannot be read or parsed, a key is unknown (the error suggests the nearest known one) or has no
    /// effect, or a value has the wrong type or is out of range.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self> {
        let changes: Vec<Override> = sets.iter().map(|set| Override::flag("--set", set)).collect();
        Ok(Loaded::read(path, &changes)?.config)
    }

    /// Parses TOML text; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    ///
    /// ```
    /// use regatta::config::Config;
    /// let text = "[model]\nkind = 'gpt'\n[data]\npath = 'x.txt'\n[train]\nbatch = 8\n";
    /// let config = Config::parse(text, "example", &["train.steps=20".into()])?;
    /// assert_eq!(config.train.steps, 20);
    /// # Ok::<(), regatta::Error>(())
    /// ```
    pub fn parse(text: &str, origin: &str, sets: &[String]) -> Result<Self> {
        let changes: Vec<Override> = sets.iter().map(|set| Override::flag("--set", set)).collect();
        Ok(Loaded::parse(text, origin, &changes)?.config)
    }

    /// Parses TOML text and applies `changes`. Returns the configuration, and who set each key.
    fn read(text: &str, origin: &str, changes: &[Override]) -> Result<(Self, Sources)> {
        let mut table: Table = text.parse().map_err(|error: toml::de::Error| Error::Config {
            origin: origin.into(),
            key: "TOML".into(),
            problem: error.to_string().trim_end().to_string(),
        })?;
        let mut sources = Sources::of_file(&table, origin);
        for change in changes {
            sources.apply(&mut table, change)?;
        }
        let reader = Reader { origin, sources: &sources };
        for key in table.keys() {
            if !SECTIONS.contains(&key.as_str()) {
                return Err(reader.error(key, unknown("section", key, &SECTIONS)));
            }
        }
        let config = Self {
            model: reader.model(&table)?,
            data: reader.section(&table, "data")?,
            train: reader.section(&table, "train")?,
            optimizer: reader.section(&table, "optimizer")?,
            parallel: reader.section(&table, "parallel")?,
            compress: reader.section(&table, "compress")?,
            local: reader.section(&table, "local")?,
            sync: reader.section(&table, "sync")?,
            sample: reader.section(&table, "sample")?,
        };
        check(&config, &reader)?;
        Ok((config, sources))
    }

    /// Checks a configuration that was not read by [`load`](Self::load); `origin` names it in errors.
    ///
    /// # Errors
    /// A value is out of range, or keys contradict one another.
    pub fn validate(&self, origin: &str) -> Result<()> {
        check(self, &Reader { origin, sources: &Sources::default() })
    }

    /// Checks a configuration from a checkpoint, which may be foreign, like one from a user. Keys that only training
    /// needs may be missing.
    pub(crate) fn check_stored(&self) -> Result<(), String> {
        let mut config = self.clone();
        config.data.path.get_or_insert_with(PathBuf::new);
        if config.train.batch_per_worker.is_none() {
            config.train.batch.get_or_insert(1);
        }
        config.validate("its configuration").map_err(|error| error.to_string())
    }
}

/// A configuration, and who set its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Who set its values.
    pub sources: Sources,
}

impl Loaded {
    /// Reads `path` and applies `changes` in their order: the last change of a key wins.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn read(path: &Path, changes: &[Override]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read the configuration", path))?;
        Self::parse(&text, &path.display().to_string(), changes)
    }

    /// Parses TOML text; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, origin: &str, changes: &[Override]) -> Result<Self> {
        let (config, sources) = Config::read(text, origin, changes)?;
        effects::check(&config, &sources, origin)?;
        Ok(Self { config, sources })
    }

    /// The settings in [`VARIABLES`] that are not the default, each as `key = value (who set it)`.
    pub fn settings(&self) -> Vec<String> {
        let values = effects::values(&self.config);
        let defaults = effects::defaults();
        let setting = |(key, _): (&str, &str)| {
            let (value, origin) = (values.get(key)?, self.sources.of(key)?);
            (defaults.get(key) != Some(value)).then(|| format!("{key} = {value} ({origin})"))
        };
        VARIABLES.into_iter().filter_map(setting).collect()
    }

    /// Warnings about keys that were set but have no effect under `plan`. One configuration may serve many plans, so
    /// these are not errors.
    pub fn warnings(&self, plan: &Plan) -> Vec<String> {
        effects::under(&self.config, plan)
            .into_iter()
            .filter(|unused| effects::given(&self.config, &self.sources, &unused.key).is_some())
            .map(|unused| format!("{} has no effect: {}", unused.key, unused.why))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPT: &str = "[model]\nkind = \"gpt\"\n[data]\npath = \"x\"\n[train]\nbatch = 12\n";

    fn problem(text: &str, sets: &[&str]) -> String {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Config::parse(text, "c.toml", &sets).unwrap_err().to_string()
    }

    #[test]
    fn defaults_sets_and_round_trip() {
        let sets = ["train.steps=7".into(), "data.path=a b.txt".into(), "optimizer.lr=3e-4".into()];
        let config = Config::parse(GPT, "c.toml", &sets).unwrap();
        assert_eq!((config.train.steps, config.optimizer.lr), (7, 3e-4));
        assert_eq!(config.data.path.as_deref(), Some(Path::new("a b.txt")));
        let text = toml::to_string(&config).unwrap();
        assert_eq!(Config::parse(&text, "again", &[]).unwrap(), config);
    }

    #[test]
    fn a_misspelt_key_suggests_the_nearest() {
        assert_eq!(
            problem(GPT, &["train.stepz=3"]),
            "c.toml: `train.stepz`: unknown key `stepz`; did you mean `steps`?"
        );
        assert!(problem(GPT, &["model.hedas=3"]).contains("did you mean `heads`?"));
        assert!(problem(GPT, &["trian.steps=3"]).contains("did you mean `train`?"));
        assert!(problem(GPT, &["train.zzzzzzzz=3"]).contains("known are steps, batch"));
        assert!(problem(GPT, &["parallel.transport=shn"]).contains("did you mean `shm`?"));
        assert!(problem("[model]\nkind='gtp'", &[]).contains("did you mean `gpt`?"));
    }

    #[test]
    fn values_out_of_range_name_their_key() {
        for (set, key) in [
            ("train.steps=0", "train.steps"),
            ("model.dropout=1.0", "model.dropout"),
            ("model.heads=7", "model.embed"),
            ("optimizer.lr=-1", "optimizer.lr"),
            ("train.batch_per_worker=3", "train.batch"),
            ("train.steps=\"many\"", "train.steps"),
            ("train.steps=-4", "train.steps"),
            ("data.kind=mnist", "data.kind"),
            ("data.kind=synthetic", "data.kind"),
            ("optimizer.lr=nan", "optimizer.lr"),
            ("parallel.deadline_s=0", "parallel.deadline_s"),
        ] {
            let problem = problem(GPT, &[set]);
            assert!(problem.starts_with(&format!("c.toml: `{key}`: ")), "{set}: {problem}");
        }
        assert!(problem("[train\n", &[]).contains("c.toml"));
        assert!(problem("[model]\nkind='gpt'\n[train]\nbatch=1", &[]).contains("`data.path`: missing"));
        assert!(problem(GPT, &["train"]).contains("must be key.path=value"));
        let resnet = "[model]\nkind='resnet'\n[data]\nkind='synthetic'\n[train]\nbatch=1";
        assert!(Config::parse(resnet, "c.toml", &[]).is_ok());
        let mnist = problem(resnet, &["data.kind=mnist"]);
        assert!(mnist.contains("32 x 32 with 3 channel(s), and these are 28 x 28 with 1"), "{mnist}");
        assert!(problem(resnet, &["data.kind=text"]).contains("learns from images"));
        assert!(problem(resnet, &["model.stages=[]"]).contains("`model.stages`: must have 1 to 6 stages"));
        assert!(problem("model = 3", &[]).contains("missing: a section [model]"));
    }
}
