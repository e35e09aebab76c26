"""The configuration: schema, loading, cross-field checks, and the resolved copy that is saved with a run."""

from deca_ds.config.load import Given, load_config, save_config
from deca_ds.config.schema import Config

__all__ = ["Config", "Given", "load_config", "save_config"]
