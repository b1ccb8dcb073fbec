"""Training of the generator against the zoo: one update, or one round of them, is one `Synthesizer.step`."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from kornia.augmentation import MixAugmentationBaseV2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd import losses as L
from dfkd.collectives import all_gather, all_reduce_mean, mean_over_processes, sync_batchnorm, world_size
from dfkd.contrast import Contrast
from dfkd.cuda_graphs import DIRECT, Calls
from dfkd.draws import STILL, Moves, augment, draw_labels, draw_latents, jitter
from dfkd.errors import UserError
from dfkd.mixing import Mixed, mix_batch
from dfkd.models.checkpoints import not_finite
from dfkd.norms import frozen_norms
from dfkd.paging import in_turn
from dfkd.renewal import RENEWED, draw_anew, redraw_steps
from dfkd.runtime import (
    Shard,
    autocast_of,
    default_shard,
    eval_mode,
    forked,
    frozen,
    full_precision,
    prepare,
    reseed,
    to_bytes,
)
from dfkd.teachers import Teacher, batch_norms, sample_teachers
from dfkd.terms import (
    IMAGE_TERMS,
    TEACHER_TERMS,
    UNUSED,
    Manner,
    ask,
    bn_loss,
    check_losses,
    image_terms,
    teacher_terms,
)
from generators import ImageGenerator, PixelGenerator, PoolGenerator

# Larger than torch's 1e-8: the first steps divide each gradient by its own size, and one that is rounding noise would
# become a full step in a random direction, different on one process and on two.
ADAM_EPS = 1e-6
PENALISED = ("ce", "one_hot", "information")
FEWEST = 4  # images an update: they are compared by twos and fours


def _gathering(x: Tensor) -> Tensor:
    """x as a leaf, in which the gradients of several backwards gather: those that a graph gives are overwritten by the
    next."""
    leaf = x.detach().requires_grad_()
    leaf.grad = torch.zeros_like(leaf)
    return leaf


class Synthesizer:
    """Trains a generator against a zoo: MixMix's Data and Feature Mixing, an image prior, an adversary (see terms.py).

    losses gives a weight per name (of the two tables of terms.py); weight 0 is not computed. With an accelerator the
    generator is prepared by it, its batch norms are synchronised, and the statistics of teachers are those of the
    global batch. student is the adversary: a module on images [B, C, H, W] in [0, 1].

    With a pool every step is a round: labels and latents are drawn once, `inner` updates work on them, and what comes
    out is put into the pool. With latent_lr the latents are learned too: those of a PixelGenerator are the images.
    Raises UserError where generator, zoo and losses do not fit together.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        zoo: Sequence[Teacher],
        *,
        losses: Mapping[str, float],
        steps: int,
        batch_size: int = 128,
        sample: int = 2,
        mix: MixAugmentationBaseV2 | None = None,
        student: nn.Module | None = None,
        lr: float = 3e-3,
        betas: Sequence[float] = (0.5, 0.999),
        clip: float = 5.0,
        bn_distance: str = "l2",
        equalise: bool = True,
        learn_weights: bool = False,
        penalise: bool = False,
        adversary_loss: str = "kl",
        adversary_mask: bool = True,
        warmup: float = 0.1,
        fade: float = 0.2,
        redraw: int = 0,
        pool: PoolGenerator | None = None,
        inner: int = 1,
        renew: str = "none",
        latent_lr: float = 0.0,
        cosine: bool = False,
        as_trained: bool = True,
        jitter: int = 0,
        flip: bool = False,
        coarse: float = 0.0,
        bank: int = 0,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        shard: Shard | None = None,
        graphs: Calls = DIRECT,
    ) -> None:
        if not isinstance(generator, ImageGenerator):
            raise UserError(
                f"the generator is a {type(generator).__name__}; give one of build_generator(), or a class of your own "
                "of generators.ImageGenerator (docs/methods.md)"
            )
        check_losses(losses, zoo, student, generator, bank)
        if batch_size < FEWEST:
            raise UserError(f"the generator learns from {FEWEST} or more images an update, got batch_size={batch_size}")
        for given, table in ((bn_distance, L.BN_DISTANCES), (adversary_loss, L.ADVERSARIES), (renew, RENEWED)):
            if given not in table:
                raise UserError(f"unknown choice {given!r}; choose from {sorted(table)}")
        for name, share in (("warmup", warmup), ("fade", fade)):
            if not 0 <= share <= 0.5:
                raise UserError(f"{name} is a share of the steps, 0 to 0.5; got {share}")
        for name, number in (("steps", steps), ("sample", sample)):
            if not isinstance(number, Integral) or number < 1:
                raise UserError(f"{name} is a whole number from 1, got {number}")
        if pool is None and (inner != 1 or coarse or latent_lr or renew != "none"):
            raise UserError(
                "inner, coarse, latent_lr and renew are about rounds, whose images a pool takes; give pool="
            )
        world = max(world_size(), int(os.environ.get("WORLD_SIZE", "1")))
        if accelerator is None and world > 1:
            raise UserError(
                f"{world} processes train one generator by the mean of their gradients, which is an "
                "accelerator's to take; give accelerator="
            )
        self.shard = shard or default_shard(accelerator.device if accelerator is not None else generator.device)
        self.graphs = graphs
        self.generator = generator.train()
        sync_batchnorm(generator)
        self.accelerator, self.autocast = accelerator, autocast_of(accelerator)
        has_weights = next(generator.parameters(), None) is not None
        if has_weights and not any(parameter.requires_grad for parameter in generator.parameters()):
            raise UserError(
                "the generator has no parameter that learns; call generator.requires_grad_(True) (one that was "
                "loaded or settled is frozen)"
            )
        self.prepared = prepare(accelerator, generator) if has_weights else generator
        self._check_images()  # on the device that it has been brought to
        self.zoo, self.student, self.mix = list(zoo), student, mix
        self.weights = {name: float(weight) for name, weight in losses.items() if weight}
        self.steps, self.batch_size, self.sample = steps, batch_size, sample
        self.clip = clip if has_weights else 0.0
        self.manner = Manner(bn_distance, adversary_loss, adversary_mask)
        self.equalise, self.penalise, self.seed = equalise, penalise, seed
        self.rise, self.fall = warmup * steps, fade * steps  # in steps
        self.pool, self.inner, self.renew, self.latent_lr = pool, inner, renew, latent_lr
        self.lr, self.betas, self.cosine = lr, (betas[0], betas[1]), cosine
        self.as_trained, self.jitter, self.flip, self.coarse = as_trained, jitter, flip, coarse
        self.redraws = redraw_steps(steps, redraw)
        self.bn_start: dict[str, Tensor] = {}
        self.bn_last: dict[str, Tensor] = {}
        self.bn_end: dict[str, Tensor] = {}
        self.named: dict[tuple[str, int], list[str]] = {}  # terms by teacher and number of what it is given
        names = [name for name in ("ce", "bn") if name in self.weights] if learn_weights else []
        self.log_variance = {n: torch.zeros((), device=self.shard.device, requires_grad=True) for n in names}
        self.contrast = self._contrast(bank) if "contrastive" in self.weights else None
        # What every process holds alike but DDP does not know of.
        self.shared = [*self.log_variance.values(), *(self.contrast.parameters() if self.contrast else ())]
        parameters = [*generator.parameters(), *self.shared]
        self.optimizer = self._adam(parameters, lr) if parameters else None
        self.last: dict[str, Tensor] = {}

    def _adam(self, parameters: list[Tensor], lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=lr, betas=self.betas, eps=ADAM_EPS, fused=True)

    @torch.no_grad()
    def _two_images(self) -> Tensor:
        """What the generator draws, whatever it is, to look at its shape and range."""
        labels = draw_labels(self.shard, 2, self.generator.classes, "images")
        latents = draw_latents(self.shard, 2, self.generator.latent, "images")
        with eval_mode(self.generator):
            return self.generator(latents, labels)

    def _check_images(self) -> None:
        """Raise UserError where the generator, maybe a user's own, does not give the images that all else relies on."""
        images = self._two_images()
        square = images.shape == (2, self.generator.channels, images.shape[-1], images.shape[-1])
        if not square or not 0 <= images.min() <= images.max() <= 1:
            raise UserError(
                f"{type(self.generator).__name__} gives {list(images.shape)} from {images.min():.3g} to "
                f"{images.max():.3g} for two latents; it is to give [2, {self.generator.channels}, side, side] in "
                "[0, 1], as by a sigmoid at its end"
            )

    def _contrast(self, bank: int) -> Contrast:
        images = self._two_images()
        with torch.no_grad(), self.zoo[0].tap_means() as means:
            self.zoo[0](images)
        if not means:
            raise UserError(UNUSED.format(self.zoo[0].name, "contrastive"))
        return Contrast(sum(each.shape[1] for each in means), self.shard, size=bank, seed=self.seed)

    def step(self, step: int) -> dict[str, Tensor]:
        """One generator update, or with a pool one round of them. Returns the unweighted terms of the last update,
        detached scalars on the device (no host sync)."""
        with self._seeded(step):
            return self._step(step)

    @contextmanager
    def _seeded(self, step: int) -> Iterator[None]:
        """Let what a generator draws in its forward, as by dropout, depend on the step alone."""
        with forked(self.shard.device):
            reseed(self.shard.device, self.seed, "generator", self.shard.rank, step)
            yield

    def _step(self, step: int) -> dict[str, Tensor]:
        if not self.generator.training:  # whoever looked at its images between two steps may have left it so
            self.generator.train()
        self._renew(step)
        labels, latents = self._draw(step)
        optimizers = [self.optimizer] if self.optimizer is not None else []
        if self.latent_lr:
            latents.requires_grad_()
            self._project(latents)
            optimizers.append(self._adam([latents], self.latent_lr))
        if self.equalise and "bn" in self.weights and not self.bn_start:
            # Once in a run: not worth compiling, where the generator is compiled.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                self.bn_start = self._bn_losses(self._images(latents, labels))
        for k in range(self.inner):
            self._schedule(optimizers, (k, self.inner) if self.pool is not None else (step, self.steps))
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            self.last = self._backward(step, k, labels, latents)
            self._update(optimizers, latents)
        if self.pool is not None or self.contrast is not None:
            self._keep(step, labels, latents)
        return self.last

    def _draw(self, step: int) -> tuple[Tensor, Tensor]:
        position = (self.seed, "synthesis", step)
        labels = draw_labels(self.shard, self.batch_size, self.generator.classes, *position, repeats=2)
        return labels, draw_latents(self.shard, self.batch_size, self.generator.latent, *position)

    def _images(self, latents: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            return full_precision(self.prepared(latents, labels))

    def _generated(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Images, and what is asked of them themselves."""
        images = self._images(latents, labels)
        return images, *image_terms(images, latents.detach(), labels, self.zoo[0], self.weights).values()

    def _backward(self, step: int, k: int, labels: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """The gradients of one update; returns its terms."""
        position: tuple[int | str, ...] = (self.seed, "synthesis", step, *([k] if k else []))
        images, *own = self.graphs.call(("generator",), self.generator, self._generated, latents, labels)
        extra = dict(zip((name for name in IMAGE_TERMS if name in self.weights), own))
        seen = jitter(images, self.jitter, self.flip, *position)
        mixed = self._mix(seen, labels, position)
        leaf = mixed.images.detach().requires_grad_()
        terms = self._teacher_terms(mixed, leaf, step, k, position)
        terms |= {name: value.detach() for name, value in extra.items()}
        roots: list[Tensor] = [mixed.images] if leaf.grad is not None else []
        gradients: list[Tensor | None] = [leaf.grad] if leaf.grad is not None else []
        if extra or self.log_variance:
            total = [self.weights[name] * value for name, value in extra.items()]
            roots.append(torch.stack([*total, *self.log_variance.values()]).sum())
            gradients.append(None)
        if roots:
            torch.autograd.backward(roots, gradients)
        return terms

    def _mix(self, images: Tensor, labels: Tensor, position: tuple[int | str, ...]) -> Mixed:
        if self.mix is None:
            return Mixed(images, labels, labels, torch.zeros_like(labels, dtype=images.dtype))
        return mix_batch(self.mix, images, labels, self.shard, *position)

    def _teacher_terms(
        self, mixed: Mixed, leaf: Tensor, step: int, k: int, position: tuple[int | str, ...]
    ) -> dict[str, Tensor]:
        """Backward every teacher's loss into the mixed images, one teacher at a time: peak memory is that of one."""
        ramp = self._ramp(step)
        # Where the adversary is all that asks them anything, the teachers rest until its warm-up is over.
        if not any(name in self.weights for name in TEACHER_TERMS if name != "adversary" or ramp):
            return {}
        update = step * self.inner + k
        chosen, upcoming = (sample_teachers(self.zoo, self.sample, self.seed, u) for u in (update, update + 1))
        seen: dict[str, list[Tensor]] = {}
        # A teacher sees the images as its training moved its own, and so does the student, which is compared with it,
        # also where it learns zoo.main alone (docs/ablations.md, "At 32x32").
        alike = sorted(chosen, key=self._moves)
        first = min(upcoming, key=self._moves)
        for moves, teachers in groupby(in_turn(alike, after=first), key=self._moves):
            view = self._view(leaf, moves, k, position)
            shown = _gathering(view)
            reply = answer = None
            if ramp and self.student is not None:
                (reply,) = self.graphs.call(("adversary",), None, partial(self._reply, self.student), shown)
                answer = _gathering(reply)
            given = [shown, mixed.labels, mixed.other, mixed.beta, *([answer] if answer is not None else [])]
            for teacher in teachers:
                terms = self._terms_of(teacher, position, *given)
                total = torch.stack([self._weigh(name, value, ramp) for name, value in terms.items()]).sum()
                (total / len(chosen)).backward()
                for name, value in terms.items():
                    seen.setdefault(name, []).append(value.detach())
            if reply is not None and answer is not None:
                reply.backward(answer.grad)
            view.backward(shown.grad)
        return {name: torch.stack(values).mean() for name, values in seen.items()}

    def _terms_of(self, teacher: Teacher, position: tuple[int | str, ...], *given: Tensor) -> dict[str, Tensor]:
        """A teacher's terms by name, its batch-norm loss where equalised in units of its value at the start."""
        graphs = DIRECT if self.contrast or teacher.pager else self.graphs  # these have memory that moves
        losses = partial(self._losses_of, teacher, position)
        values = graphs.call(("teachers", teacher.name), None, losses, *given)
        terms = dict(zip(self.named[teacher.name, len(given)], values))
        if "bn" in terms:
            self.bn_last[teacher.name] = terms["bn"].detach()
            start = self.bn_start.setdefault(teacher.name, terms["bn"].detach())
            terms["bn"] = terms["bn"] / start if self.equalise else terms["bn"]
        return terms

    def _losses_of(self, teacher: Teacher, position: tuple[int | str, ...], *given: Tensor) -> tuple[Tensor, ...]:
        """A teacher's terms of mixed images, their labels and shares, and the adversary's logits where it counts."""
        mixed = Mixed(*given[:4])
        answer = ask(teacher, mixed, self.weights, self.manner, self.autocast, self.contrast, position)
        self._check_logits(f"teacher {teacher.name}", answer.logits)
        answer.student = given[4] if len(given) > 4 else None
        terms = teacher_terms(answer, self.weights)
        self.named[teacher.name, len(given)] = list(terms)  # a graph knows their values alone
        return tuple(terms.values())

    def _moves(self, teacher: Teacher) -> Moves:
        """How a teacher is shown the images moved."""
        return teacher.moves if self.as_trained else STILL

    def _view(self, images: Tensor, moves: Moves, k: int, position: tuple[int | str, ...]) -> Tensor:
        """Images [B, C, H, W] as teachers see them in update k of a round."""
        images = augment(images, self.shard, moves, *position)
        return F.avg_pool2d(images, 2) if k < self.coarse * self.inner else images

    def _reply(self, student: nn.Module, images: Tensor) -> tuple[Tensor]:
        """The adversary's logits [B, K], as those of a frozen network in eval mode."""
        norms = batch_norms(student).values()
        with eval_mode(student), frozen(student), frozen_norms(norms), self.autocast():
            logits = student(images)
        self._check_logits("the student", logits)
        return (logits,)

    def _check_logits(self, whose: str, logits: object) -> None:
        given = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else f"a {type(logits).__name__} of"
        if given != (self.generator.classes,):
            raise UserError(
                f"{whose} gives {given} outputs where the generator has {self.generator.classes} classes; make them "
                "agree"
            )

    def _weigh(self, name: str, value: Tensor, ramp: float) -> Tensor:
        weight = self.weights[name] * (ramp if name == "adversary" else 1.0)
        if name in self.log_variance:
            return weight * torch.exp(-self.log_variance[name]) * value
        if self.penalise and name in PENALISED:
            before = self.last.get(name, value.detach())
            return weight * torch.exp(all_reduce_mean(value - before))
        return weight * value

    def _ramp(self, step: int) -> float:
        """The adversary's share of its weight: 0 during warm-up, then linear up to 1 over as many steps again; at the
        end likewise down to 0, so that the generator left behind does not draw against this one student."""
        if "adversary" not in self.weights:
            return 0.0
        up = (step + 1 - self.rise) / self.rise if self.rise else 1.0
        down = (self.steps - self.fall - step) / self.fall if self.fall else 1.0
        return max(0.0, min(1.0, up, down))

    def _schedule(self, optimizers: Sequence[torch.optim.Optimizer], progress: tuple[int, int]) -> None:
        if not self.cosine:
            return
        factor = 0.5 * (1 + math.cos(math.pi * progress[0] / progress[1]))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * (self.lr if optimizer is self.optimizer else self.latent_lr)

    def _update(self, optimizers: Sequence[torch.optim.Optimizer], latents: Tensor) -> None:
        mean_over_processes([p.grad for p in self.shared if p.grad is not None])
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.generator.parameters(), self.clip)
        if latents.grad is not None:
            latents.grad /= self.shard.world  # the loss is a mean over the global batch
        for optimizer in optimizers:
            optimizer.step()
        self._project(latents)

    def _project(self, latents: Tensor) -> None:
        if self.latent_lr and isinstance(self.generator, PixelGenerator):
            self.generator.project_(latents)

    @torch.no_grad()
    def _keep(self, step: int, labels: Tensor, latents: Tensor) -> None:
        """Put the images of a round into the pool, and their features into the memory bank."""
        images = self._images(latents, labels)
        if self.contrast is not None:
            with self.autocast():
                moves = self._moves(self.zoo[0])
                self.contrast.remember(self.zoo[0], augment(images, self.shard, moves, self.seed, "bank", step))
        if self.pool is not None:
            self.pool.push(all_gather(to_bytes(images)), all_gather(labels))

    @torch.no_grad()
    def _bn_losses(self, images: Tensor) -> dict[str, Tensor]:
        """Each teacher's batch-norm loss on images, unmixed, as it is shown them. At the start it is what the
        loss is divided by from then on."""
        losses = {}
        for teacher in in_turn(self.zoo):
            # Twice in a run: not worth compiling, where the teachers are compiled.
            with torch.compiler.set_stance("force_eager"), teacher.tap() as statistics, self.autocast():
                teacher(augment(images, self.shard, self._moves(teacher), self.seed, "statistics"))
            losses[teacher.name] = bn_loss(teacher, statistics, self.manner.bn_distance)
        return losses

    def _renew(self, step: int) -> None:
        """Draw layers of the generator anew and forget their optimiser state: images it had settled on give way to
        others, while the other layers keep what they learned (FastDFKD, Fang et al. 2022, section 3.3)."""
        modules = self.generator.first_layers() if step in self.redraws else []
        modules = (RENEWED[self.renew](self.generator) if step and self.renew != "none" else []) or modules
        draw_anew(modules, self.seed, "redraw", step)
        for parameter in (p for module in modules for p in module.parameters()):
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def settle(self, batches: int = 50) -> ImageGenerator:
        """Finish what is streamed, frozen and in eval mode, and return it: the pool, or the generator, whose running
        statistics become the mean over fresh batches of what its batch norms see in training, so that eval mode draws
        the images that were trained. Raises UserError where a weight is NaN or infinite."""
        self.graphs.forget()
        if broken := not_finite(self.generator):
            terms = [name for name, value in self.last.items() if not value.isfinite()]
            of = f" and so do its terms {', '.join(terms)}" if terms else ""
            raise UserError(f"{broken[0]} of the generator holds NaN or infinity{of}; lower lr or a loss weight")
        done = self.generator if self.pool is None else self.pool
        norms = [module for module in done.modules() if isinstance(module, _BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for k in range(batches if norms else 0):
            for norm in norms:
                norm.momentum = 1 / (k + 1)
            labels, latents = self._draw(self.steps + k)
            with self._seeded(self.steps + k):
                self._images(latents, labels)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        done.eval().requires_grad_(False)
        if self.bn_start:
            position = (self.seed, "synthesis", self.steps + batches)
            labels = draw_labels(self.shard, self.batch_size, done.classes, *position, repeats=2)
            latents = draw_latents(self.shard, self.batch_size, done.latent, *position)
            with self.autocast():
                self.bn_end = self._bn_losses(full_precision(done(latents, labels)))
        return done

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside the weights or images of what is streamed."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            "bn_start": self.bn_start,
            "bn_last": self.bn_last,
            "bn_end": self.bn_end,
            "last": self.last,
            "log_variance": {name: value.detach() for name, value in self.log_variance.items()},
            "contrast": self.contrast.state_dict() if self.contrast is not None else None,
        }
        if self.pool is not None:
            state["generator"] = self.generator.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state_dict of the same recipe."""
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.contrast is not None:
            self.contrast.load_state_dict(state["contrast"])
        if self.pool is not None:
            self.generator.load_state_dict(state["generator"])
        self.bn_start, self.bn_last = dict(state["bn_start"]), dict(state["bn_last"])
        self.bn_end, self.last = dict(state["bn_end"]), dict(state["last"])
        for name, value in state["log_variance"].items():
            with torch.no_grad():
                self.log_variance[name].copy_(value)
