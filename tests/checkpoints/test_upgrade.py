import json

import torch

import paperworks as pw
from paperworks.checkpoints.upgrade import from_format_1
from paperworks.core.spec import Spec
from paperworks.models import Block, Decoder, Parallel, PostNorm
from paperworks.nn import MLP, Attention, LayerNorm


def test_words_of_format_1_become_specs():
    block = Block(norm=LayerNorm(), mixer=Attention(heads=2), feedforward=MLP(hidden=8))
    new = Decoder(vocab_size=5, dim=4, depth=1, block=block, norm=None)
    for word, flag, arrangement in (("post", False, PostNorm()), ("parallel", True, Parallel(shared_norm=True))):
        old = new.to_dict()
        old["block"] |= {"arrangement": word, "shared_norm": flag}
        old["init"] = "normal"
        found = Spec.from_dict(from_format_1(json.loads(json.dumps(old))))
        assert found.block.arrangement == arrangement
        assert found.init == new.init
    old["init"] = "fan_in"
    assert type(Spec.from_dict(from_format_1(old)).init).__name__ == "T5Initialization"


def test_a_folder_of_format_1_loads(tmp_path):
    block = Block(norm=LayerNorm(), mixer=Attention(heads=2), feedforward=MLP(hidden=8))
    model = pw.build(Decoder(vocab_size=5, dim=4, depth=1, block=block, norm=LayerNorm())).eval()
    pw.save(model, tmp_path / "m")
    path = tmp_path / "m" / "spec.json"
    header = json.loads(path.read_text())
    header["format"] = 1
    header["spec"]["init"] = "normal"
    header["spec"]["block"] |= {"arrangement": "pre", "shared_norm": False}
    path.write_text(json.dumps(header))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(pw.load(tmp_path / "m")(tokens), model(tokens))
