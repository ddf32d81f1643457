"""A model card names data and templates without saying where they were."""

import yaml

from deltaw.export._card import _recipe
from deltaw.train.recipe import parse


def test_of_local_paths_the_card_has_the_names_alone() -> None:
    places = {
        "model": "/home/me/model",
        "data": "/home/me/a.json#500,owner/set:part,../b.json",
        "eval_data": "/home/me/held.json,./more.json",
        "dataset_dir": "/home/me/info",
        "template": "/home/me/own.jinja",
    }
    assert yaml.safe_load(_recipe(parse(places))) == {
        "model": "model",
        "data": "a.json#500,owner/set:part,b.json",
        "eval_data": "held.json,more.json",
        "dataset_dir": "info",
        "template": "own.jinja",
    }
