"""The command line of the scripts: arguments, and how a YAML file and flags fill them."""

from .arguments import ModelArguments, ScriptArguments, make_peft_config, merged_init_kwargs
from .parsing import parse_args
from .script import run_script

__all__ = ["ModelArguments", "ScriptArguments", "make_peft_config", "merged_init_kwargs", "parse_args", "run_script"]
