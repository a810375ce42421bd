"""The embedded demo: a tiny model and preference data made on the spot, so that the whole path runs without a download.

world.py       names, foods, sentences, tokenizer        base_model.py  training from nothing, the cache
pairs.py       sampling, reward, preference pairs        results.py     what a saved model says, and how it drifted
curves.py      CSV and PNG of the log                    run.py         all of it in order
"""

from .base_model import demo_model_and_tokenizer
from .pairs import demo_datasets
from .run import DemoResult, demo_config_defaults, run_demo

__all__ = ["DemoResult", "demo_config_defaults", "demo_datasets", "demo_model_and_tokenizer", "run_demo"]
