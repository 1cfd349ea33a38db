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
# Copying from the prompt gates every task that quotes it, and comes late: ever stronger doses of it (see LOG.md).
FOCUS = {
    "code": 0.07, "chat_code": 0.26, "chat_maths": 0.30, "prose": 0.03, "multilingual": 0.04, "chat_general": 0.30,
}  # fmt: skip
COPY = {
    "code": 0.04, "chat_code": 0.20, "chat_maths": 0.24, "prose": 0.02, "multilingual": 0.02, "chat_general": 0.20,
    "chat_copy": 0.18, "induction": 0.10,
}  # fmt: skip
CHAT = {
    "code": 0.04, "chat_code": 0.22, "chat_maths": 0.27, "prose": 0.02, "multilingual": 0.02, "chat_general": 0.22,
    "chat_copy": 0.17, "induction": 0.04,
}  # fmt: skip


def recipe() -> Recipe:
    return Recipe(
        name="nano",
        config=GLMConfig.read(Path(glm52.__file__).parent / "nano"),
        stages=(
            Stage(name="pretrain", tokens=5_650_000, mixture=MIXTURE, distill_every=12, router_bias_lr=2e-3),
            Stage(name="focus", tokens=3_948_544, mixture=FOCUS, warmup_steps=1, distill_every=16),
            Stage(name="copy", tokens=483_328, mixture=COPY, muon_lr=0.012, adam_lr=2e-3, warmup_steps=1,
                  prompt_weight=0.15, distill_every=16),
            Stage(name="chat", tokens=5_500_000, mixture=CHAT, muon_lr=0.01, adam_lr=2e-3, warmup_steps=1,
                  decay_fraction=0.7, prompt_weight=0.1, distill_every=16),
        ),
    )  # fmt: skip
