"""The small model that ships with the package: 9.8 million parameters, the whole GLM-5.2 architecture.

About 40 % code, 30 % maths, 30 % general and multilingual; six tenths of it conversations from our own generators.
"""

from pathlib import Path

import glm52
from glm52.config import GLMConfig
from glm52.train.trainer import Recipe, Stage

MIXTURE = {
    "code": 0.16, "chat_code": 0.20, "chat_maths": 0.29, "prose": 0.06, "multilingual": 0.09, "chat_general": 0.20,
}  # fmt: skip
LONG = {
    "code": 0.10, "prose": 0.04, "multilingual": 0.04, "chat_code": 0.12, "chat_maths": 0.15, "chat_general": 0.15,
    "chat_long": 0.40,
}  # fmt: skip
CHAT = {"chat_code": 0.28, "chat_maths": 0.30, "chat_general": 0.25, "chat_long": 0.17}


def recipe() -> Recipe:
    return Recipe(
        name="nano",
        config=GLMConfig.read(Path(glm52.__file__).parent / "nano"),
        stages=(
            Stage(name="pretrain", tokens=8_500_000, mixture=MIXTURE, distill_every=12, router_bias_lr=2e-3),
            Stage(name="long", tokens=1_200_000, mixture=LONG, window=4096, micro_tokens=4096, muon_lr=0.01,
                  adam_lr=1.5e-3, warmup_steps=10, mtp_weight=0.2),
            Stage(name="indexer", tokens=200_000, mixture=LONG, window=4096, micro_tokens=4096, trainable="indexer",
                  distill_every=1, adam_lr=2e-3, warmup_steps=4, decay_fraction=0.8, final_lr=0.1, mtp_weight=0.0,
                  router_bias_lr=0.0),
            Stage(name="chat", tokens=1_500_000, mixture=CHAT, window=4096, micro_tokens=4096, index_topk=256,
                  distill_every=6, muon_lr=0.01, adam_lr=1.5e-3, warmup_steps=10, decay_fraction=1.0,
                  prompt_weight=0.05, router_bias_lr=0.0),
        ),
    )  # fmt: skip
