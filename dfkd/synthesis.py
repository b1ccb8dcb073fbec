"""Training of the generator against the zoo: one update is one `Synthesizer.step`."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from kornia.augmentation import MixAugmentationBaseV2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd import losses as L
from dfkd.collectives import all_reduce_mean, mean_over_processes, sync_batchnorm
from dfkd.errors import UserError
from dfkd.mixing import Mixed, mix_batch
from dfkd.runtime import Shard, eval_mode, frozen, full_precision, rng
from dfkd.teachers import Teacher, batch_norms, sample_teachers
from generators import ImageGenerator

# Larger than torch's 1e-8: the first steps divide each gradient by its own size, and one that is rounding noise would
# become a full step in a random direction, different on one process and on two.
ADAM_EPS = 1e-6
TEACHER_LOSSES = ("ce", "bn", "adversary", "one_hot", "activation", "information", "likeness")
LOSSES = (*TEACHER_LOSSES, "diversity", "tv", "l2")


def draw_labels(shard: Shard, batch: int, classes: int, *position: int | str, repeats: int = 1) -> Tensor:
    """Labels [batch] int64 of this rank, balanced over the global batch, as equal neighbours where repeats is 2.

    Every class appears equally often (to one) where the global batch holds all of them `repeats` times; else as many
    classes as fit are picked at random.
    """
    total = batch * shard.world
    generator = rng(shard.device, *position, "labels")
    chosen = torch.randperm(classes, generator=generator, device=shard.device)[: max(1, total // repeats)]
    labels = chosen[torch.arange(total, device=shard.device).mul(len(chosen)).div(total, rounding_mode="floor")]
    blocks = total // repeats
    order = torch.randperm(blocks, generator=generator, device=shard.device)
    shuffled = labels[: blocks * repeats].view(blocks, repeats)[order].reshape(-1)
    return shard.take(torch.cat([shuffled, labels[blocks * repeats :]]))


def draw_latents(shard: Shard, batch: int, latent: int, *position: int | str) -> Tensor:
    """Standard normal latents [batch, latent] of this rank, its part of the global batch's."""
    generator = rng(shard.device, *position, "latents")
    return shard.take(torch.randn(batch * shard.world, latent, generator=generator, device=shard.device))


def redraw_steps(steps: int, times: int) -> set[int]:
    """The steps at which the first layers are drawn anew: evenly over the first 80 % of training, never step 0."""
    return {round(0.8 * steps * k / times) for k in range(1, times + 1)} - {0} if times else set()


def check_losses(losses: Mapping[str, float], zoo: Sequence[Teacher], student: nn.Module | None) -> None:
    """Raise UserError for loss weights by name (LOSSES) that are unknown, or that these teachers cannot serve."""
    unknown = sorted(set(losses) - set(LOSSES))
    if unknown:
        raise UserError(f"unknown generator losses {unknown}; choose from {list(LOSSES)}")
    if losses.get("adversary") and student is None:
        raise UserError(
            "synthesis.losses.adversary needs a student to disagree with; set student.model or its weight to 0"
        )
    if not any(losses.get(name) for name in TEACHER_LOSSES):
        wanted = ", ".join(f"synthesis.losses.{name}" for name in TEACHER_LOSSES)
        raise UserError(f"no loss asks a teacher anything; give one of {wanted} some weight")
    if len({teacher.name for teacher in zoo}) < len(zoo):
        raise UserError(f"teachers need names of their own, got {[teacher.name for teacher in zoo]}")
    for teacher in zoo:
        if losses.get("bn") and not batch_norms(teacher.model):
            raise UserError(f"teacher {teacher.name} has no batch norm; set synthesis.losses.bn=0")
        if losses.get("activation") and not any(isinstance(module, nn.Linear) for module in teacher.modules()):
            raise UserError(
                f"teacher {teacher.name} has no linear layer to read features from; set synthesis.losses.activation=0"
            )


class Synthesizer:
    """Trains a generator against a zoo: MixMix's Data and Feature Mixing, an image prior, an adversary (see losses.py).

    losses gives a weight per name (LOSSES); weight 0 is not computed. With an accelerator the generator is prepared by
    it, its batch norms are synchronised, and the statistics of teachers are those of the global batch. student is the
    adversary: a module on images [B, C, H, W] in [0, 1].
    """

    def __init__(
        self,
        generator: ImageGenerator,
        zoo: Sequence[Teacher],
        *,
        losses: Mapping[str, float],
        steps: int,
        batch_size: int = 256,
        sample: int = 2,
        mix: MixAugmentationBaseV2 | None = None,
        student: nn.Module | None = None,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.5, 0.999),
        clip: float = 5.0,
        bn_distance: str = "l2",
        equalise: bool = True,
        learn_weights: bool = False,
        adversary_loss: str = "l1",
        warmup: float = 0.1,
        redraw: int = 0,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        shard: Shard | None = None,
    ) -> None:
        check_losses(losses, zoo, student)
        for given, table in ((bn_distance, L.BN_DISTANCES), (adversary_loss, L.STUDENT_LOSSES)):
            if given not in table:
                raise UserError(f"unknown distance {given!r}; choose from {sorted(table)}")
        self.shard = shard or Shard(next(generator.parameters()).device)
        self.generator = generator.train()
        sync_batchnorm(generator)
        self.prepared = accelerator.prepare(generator) if accelerator else generator
        self.autocast = accelerator.autocast if accelerator else nullcontext
        self.zoo, self.student, self.mix = list(zoo), student, mix
        self.weights = {name: float(weight) for name, weight in losses.items() if weight}
        self.steps, self.batch_size, self.sample, self.clip = steps, batch_size, sample, clip
        self.bn_distance, self.equalise = L.BN_DISTANCES[bn_distance], equalise
        self.adversary_loss, self.warmup, self.seed = adversary_loss, warmup, seed
        self.redraws = redraw_steps(steps, redraw)
        self.bn_start: dict[str, Tensor] = {}
        self.bn_last: dict[str, Tensor] = {}
        self.bn_end: dict[str, Tensor] = {}
        names = [name for name in ("ce", "bn") if name in self.weights] if learn_weights else []
        self.log_variance = {n: torch.zeros((), device=self.shard.device, requires_grad=True) for n in names}
        parameters = [*generator.parameters(), *self.log_variance.values()]
        self.optimizer = torch.optim.Adam(parameters, lr=lr, betas=(betas[0], betas[1]), eps=ADAM_EPS, fused=True)
        self.last: dict[str, Tensor] = {}

    def step(self, step: int) -> dict[str, Tensor]:
        """One generator update. Returns the unweighted terms, detached scalars on the device (no host sync)."""
        if step in self.redraws:
            self._redraw(step)
        if self.equalise and "bn" in self.weights and not self.bn_start:
            self.bn_start = self._bn_losses(0)
        self.optimizer.zero_grad(set_to_none=True)
        images, latents, labels = self._draw(step)
        mixed = self._mix(images, labels, step)
        leaf = mixed.images.detach().requires_grad_()
        terms = self._teacher_terms(mixed, leaf, step)
        extra = self._image_terms(images, latents, labels)
        terms |= {name: value.detach() for name, value in extra.items()}
        roots: list[Tensor] = [mixed.images] if leaf.grad is not None else []
        gradients: list[Tensor | None] = [leaf.grad] if leaf.grad is not None else []
        if extra or self.log_variance:
            total = [self.weights[name] * value for name, value in extra.items()]
            roots.append(torch.stack([*total, *self.log_variance.values()]).sum())
            gradients.append(None)
        if roots:
            torch.autograd.backward(roots, gradients)
        self._update()
        self.last = terms
        return terms

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        position = (self.seed, "synthesis", step)
        labels = draw_labels(self.shard, self.batch_size, self.generator.classes, *position, repeats=2)
        latents = draw_latents(self.shard, self.batch_size, self.generator.latent, *position)
        with self.autocast():
            return full_precision(self.prepared(latents, labels)), latents, labels

    def _mix(self, images: Tensor, labels: Tensor, step: int) -> Mixed:
        if self.mix is None:
            return Mixed(images, labels, labels, torch.zeros_like(labels, dtype=images.dtype))
        return mix_batch(self.mix, images, labels, self.shard, self.seed, "synthesis", step)

    def _teacher_terms(self, mixed: Mixed, leaf: Tensor, step: int) -> dict[str, Tensor]:
        """Backward every teacher's loss into the mixed images, one teacher at a time: peak memory is that of one."""
        ramp = self._ramp(step)
        # Where the adversary is all that asks them anything, the teachers rest until its warm-up is over.
        asked = any(name in self.weights for name in TEACHER_LOSSES if name != "adversary" or ramp)
        chosen = sample_teachers(self.zoo, self.sample, self.seed, step) if asked else []
        seen: dict[str, list[Tensor]] = {}
        answer = answer_leaf = None
        if ramp and self.student is not None:
            with eval_mode(self.student), frozen(self.student), self.autocast():
                answer = self.student(leaf)
            answer_leaf = answer.detach().requires_grad_()
        for teacher in chosen:
            terms = self._one_teacher(teacher, mixed, leaf, answer_leaf)
            total = torch.stack([self._weigh(name, value, ramp) for name, value in terms.items()]).sum()
            (total / len(chosen)).backward()
            for name, value in terms.items():
                seen.setdefault(name, []).append(value.detach())
        if answer is not None and answer_leaf is not None:
            answer.backward(answer_leaf.grad)
        return {name: torch.stack(values).mean() for name, values in seen.items()}

    def _one_teacher(self, teacher: Teacher, mixed: Mixed, leaf: Tensor, answer: Tensor | None) -> dict[str, Tensor]:
        wanted = self.weights
        with ExitStack() as stack:
            statistics = stack.enter_context(teacher.tap()) if "bn" in wanted else None
            features = stack.enter_context(teacher.tap_features()) if "activation" in wanted else None
            likeness: list[Tensor] = []
            if "likeness" in wanted:
                likeness = stack.enter_context(teacher.tap_maps(lambda maps: L.likeness(maps, mixed.labels)))
            with self.autocast():
                logits = teacher(leaf)
        terms = {}
        if "ce" in wanted:
            terms["ce"] = L.mixed_ce(logits, mixed.labels, mixed.other, mixed.beta)
        if statistics is not None:
            distance = self.bn_distance(statistics.gather(), statistics.stored)
            self.bn_last[teacher.name] = distance.detach()
            terms["bn"] = distance / self.bn_start.get(teacher.name, 1.0)
        if answer is not None:
            terms["adversary"] = -L.masked_divergence(answer, logits, self.adversary_loss)
        if likeness:
            terms["likeness"] = torch.stack(likeness).mean()
        if "one_hot" in wanted:
            terms["one_hot"] = L.one_hot(logits)
        if features is not None:
            terms["activation"] = L.activation(features[-1])
        if "information" in wanted:
            terms["information"] = L.information(all_reduce_mean(logits.softmax(1).mean(0)))
        return terms

    def _image_terms(self, images: Tensor, latents: Tensor, labels: Tensor) -> dict[str, Tensor]:
        terms = {}
        if "diversity" in self.weights:
            terms["diversity"] = L.mode_seeking(images, latents, labels)
        if "tv" in self.weights:
            terms["tv"] = L.total_variation(images)
        if "l2" in self.weights:
            terms["l2"] = L.pixel_l2(images, self.zoo[0].mean, self.zoo[0].std)
        return terms

    def _weigh(self, name: str, value: Tensor, ramp: float) -> Tensor:
        weight = self.weights[name] * (ramp if name == "adversary" else 1.0)
        if name in self.log_variance:
            return weight * torch.exp(-self.log_variance[name]) * value
        return weight * value

    def _ramp(self, step: int) -> float:
        """0 before the adversary's warm-up is over, then linear up to 1 over as many steps again."""
        if "adversary" not in self.weights:
            return 0.0
        warmup = self.warmup * self.steps
        return min(1.0, max(0.0, (step + 1 - warmup) / warmup)) if warmup else 1.0

    def _update(self) -> None:
        mean_over_processes([s.grad for s in self.log_variance.values() if s.grad is not None])
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.generator.parameters(), self.clip)
        self.optimizer.step()

    @torch.no_grad()
    def _bn_losses(self, step: int) -> dict[str, Tensor]:
        """Each teacher's batch-norm loss on the images of a step, unmixed. At the start it is what the loss is divided
        by from then on."""
        images, _, _ = self._draw(step)
        losses = {}
        for teacher in self.zoo:
            with teacher.tap() as statistics, self.autocast():
                teacher(images)
            losses[teacher.name] = self.bn_distance(statistics.gather(), statistics.stored)
        return losses

    def _redraw(self, step: int) -> None:
        """Draw the generator's first layers anew and forget their optimiser state: images it had settled on give way
        to others, while the later layers keep what they learned (FastDFKD, Fang et al. 2022, section 3.3)."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng("cpu", self.seed, "redraw", step).initial_seed())
            for module in self.generator.first_layers():
                device = next(module.parameters()).device
                module.cpu().reset_parameters()  # type: ignore[operator]
                module.to(device)
                for parameter in module.parameters():
                    self.optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def settle(self, batches: int = 50) -> ImageGenerator:
        """Finish the generator: running statistics become the mean over fresh batches of what its batch norms see in
        training, so that eval mode draws the images that were trained. Returns it frozen, in eval mode."""
        norms = [module for module in self.generator.modules() if isinstance(module, _BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for k in range(batches):
            for norm in norms:
                norm.momentum = 1 / (k + 1)
            self._draw(self.steps + k)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        if self.bn_start:
            self.bn_end = self._bn_losses(self.steps + batches)
        return self.generator.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside the generator's weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "bn_start": self.bn_start,
            "bn_last": self.bn_last,
            "bn_end": self.bn_end,
            "last": self.last,
            "log_variance": {name: value.detach() for name, value in self.log_variance.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state_dict of the same recipe."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.bn_start, self.bn_last = dict(state["bn_start"]), dict(state["bn_last"])
        self.bn_end, self.last = dict(state["bn_end"]), dict(state["last"])
        for name, value in state["log_variance"].items():
            with torch.no_grad():
                self.log_variance[name].copy_(value)
