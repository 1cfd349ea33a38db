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
# Copying from the prompt gates every task that quotes it. Three ever stronger doses of it (see LOG.md for why three).
FOCUS = {
    "code": 0.07, "chat_code": 0.26, "chat_maths": 0.30, "prose": 0.03, "multilingual": 0.04, "chat_general": 0.30,
}  # fmt: skip
COPY = {
    "code": 0.04, "chat_code": 0.20, "chat_maths": 0.24, "prose": 0.02, "multilingual": 0.02, "chat_general": 0.20,
    "chat_copy": 0.18, "induction": 0.10,
}  # fmt: skip
LONG = {
    "code": 0.04, "prose": 0.02, "multilingual": 0.02, "chat_code": 0.17, "chat_maths": 0.20, "chat_general": 0.17,
    "chat_copy": 0.08, "chat_long": 0.30,
}  # fmt: skip
CHAT = {"chat_code": 0.28, "chat_maths": 0.30, "chat_general": 0.25, "chat_long": 0.17}


def recipe() -> Recipe:
    return Recipe(
        name="nano",
        config=GLMConfig.read(Path(glm52.__file__).parent / "nano"),
        stages=(
            Stage(name="pretrain", tokens=5_650_000, mixture=MIXTURE, distill_every=12, router_bias_lr=2e-3),
            Stage(name="focus", tokens=3948544, mixture=FOCUS, warmup_steps=1, distill_every=16),
            Stage(name="copy", tokens=3_000_000, mixture=COPY, muon_lr=0.012, adam_lr=2e-3, warmup_steps=1,
                  decay_fraction=1.0, final_lr=0.35, prompt_weight=0.15, distill_every=16),
            Stage(name="long", tokens=720_000, mixture=LONG, window=4096, micro_tokens=4096, muon_lr=0.005,
                  adam_lr=8e-4, warmup_steps=5, mtp_weight=0.2, prompt_weight=0.15),
            Stage(name="indexer", tokens=82_000, mixture=LONG, window=4096, micro_tokens=4096, trainable="indexer",
                  distill_every=1, adam_lr=2e-3, warmup_steps=4, decay_fraction=0.8, final_lr=0.1, mtp_weight=0.0,
                  router_bias_lr=0.0),
            Stage(name="chat", tokens=900_000, mixture=CHAT, window=4096, micro_tokens=4096, index_topk=256,
                  distill_every=6, muon_lr=0.005, adam_lr=8e-4, warmup_steps=5, decay_fraction=1.0,
                  prompt_weight=0.05, router_bias_lr=0.0),
        ),
    )  # fmt: skip
