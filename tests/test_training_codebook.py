"""Stage 1: the codebook starts from embeddings, stays in use, and a run whose codebook is lost stops."""

import pytest
import torch
from quantizer_training import SMALL, StopAt, arguments, trainer_for
from recordings import meta, tensors
from tiny_models import quantizer_config
from transformers import TrainerCallback

from lapa import LapaQuantizer
from lapa.modeling_lapa.vector_quantization_lapa import replace_unused_codes_published
from lapa.training.codebook import (
    clear_moments,
    codebook_from_embeddings,
    dead_codes,
    published_update_due,
    reseed_codes,
)
from lapa.training.quantizer_trainer import CodebookCollapse


def test_reseeding_revives_a_collapsed_codebook(tmp_path):
    def used_at_the_end(rule):
        torch.manual_seed(0)
        model = LapaQuantizer(quantizer_config(**SMALL))
        # Far from every embedding, all but one: one code takes all.
        model.vector_quantizer.codebook.data.fill_(100.0)
        model.vector_quantizer.codebook.data[3] = 0.0
        trainer = trainer_for(
            tmp_path / rule, model, max_steps=16, codebook_update=rule, codebook_update_interval=4,
            codebook_update_until=12, codebook_init_from_data=False,
        )  # fmt: skip
        trainer.train()
        return trainer.evaluate()["eval_codes_used"], trainer.codebook_state.num_replaced

    assert used_at_the_end("none") == (1, 0)
    used, replaced = used_at_the_end("reseed")
    assert used >= 7 and replaced >= 7


def test_reseeding_stops(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=10, codebook_update_interval=1, codebook_update_threshold=0.99)
    updates = []
    trainer.add_callback(
        type("Watch", (TrainerCallback,), {
            "on_step_end": lambda self, args, state, control, **kwargs: updates.append(trainer.codebook_state.num_replaced)
        })
    )  # fmt: skip
    trainer.train()
    # By default the last fifth of the training leaves the codebook alone.
    assert updates[7] > updates[0] and updates[9] == updates[7]


def test_fresh_codebook_starts_from_embeddings(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1, learning_rate=1e-12)
    pairs = trainer.train_dataset
    embeddings = {}
    start = trainer._start_codebook

    def watch(batches):
        pixel_values = torch.cat(batches)
        embeddings["first"] = trainer.model.encode(pixel_values).latent_action_embeddings.detach().flatten(0, 1)
        start(batches)

    trainer._start_codebook = watch
    trainer.train()
    distances = torch.cdist(trainer.codebook.detach(), embeddings["first"]).min(1).values
    assert distances.max() < 0.02 * embeddings["first"].std()
    assert len(pairs) == 36

    trainer.save_model(tmp_path / "saved")
    loaded = LapaQuantizer.from_pretrained(tmp_path / "saved")
    loaded.vector_quantizer.codebook.data.fill_(7.0)
    again = trainer_for(tmp_path, loaded, max_steps=1, learning_rate=1e-12)
    again.train()
    assert torch.allclose(again.codebook, torch.tensor(7.0)), "the codebook of a loaded model was overwritten"


def test_reseeding_puts_dead_codes_on_distinct_embeddings():
    codebook = torch.full((4, 1), 100.0)
    dead = torch.tensor([True, False, True, True])
    reseed_codes(codebook, dead, torch.tensor([[1.0], [2.0], [3.0]]), torch.Generator().manual_seed(0))
    assert codebook[1].item() == 100.0
    assert sorted(codebook[dead].flatten().round().tolist()) == [1.0, 2.0, 3.0]
    # With fewer embeddings than dead codes they repeat, a little apart.
    codebook_from_embeddings(codebook, torch.tensor([[1.0], [2.0]]), torch.Generator().manual_seed(0))
    assert sorted(codebook.flatten().round().tolist()) == [1.0, 1.0, 2.0, 2.0]
    assert len(codebook.unique()) == 4


def test_reseed_by_hand():
    codebook = torch.tensor([[0.0, 0.0], [50.0, 50.0], [1.0, 1.0]])
    embeddings = torch.tensor([[0.0, 0.0], [1.0, 1.0], [8.0, 8.0]])
    reseed_codes(codebook, torch.tensor([False, True, False]), embeddings, torch.Generator().manual_seed(0))
    assert codebook[[0, 2]].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert torch.allclose(codebook[1], torch.tensor([8.0, 8.0]), atol=0.05)
    codebook_from_embeddings(codebook, embeddings, torch.Generator().manual_seed(1))
    assert sorted(codebook[:, 0].round().tolist()) == [0.0, 1.0, 8.0]


def test_dead_codes_by_hand():
    assert dead_codes(torch.tensor([97, 2, 1, 0]), 0.1).tolist() == [False, True, True, True]
    assert dead_codes(torch.tensor([25, 25, 47, 3]), 0.1).tolist() == [False] * 4
    assert dead_codes(torch.zeros(3), 0.1).tolist() == [False] * 3


def test_moments_of_replaced_rows_are_cleared():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    clear_moments(optimizer, parameter, torch.tensor([False, True, False]))
    state = optimizer.state[parameter]
    assert state["exp_avg"][1].tolist() == [0, 0] and state["exp_avg_sq"][1].tolist() == [0, 0]
    assert (state["exp_avg"][[0, 2]] > 0).all() and float(state["step"]) == 1


def test_published_schedule():
    due = [step for step in range(6000) if published_update_due(step)]
    assert due == [*range(10, 100, 10), *range(100, 1000, 100), *range(1000, 5000, 500)]


@pytest.mark.parametrize("name", ["n4", "n1", "n2", "n16"])
@pytest.mark.parametrize("case", ["few", "many", "none", "border", "all"])
def test_published_replacement_equals_recordings(name, case):
    recorded, settings = tensors(f"laq/{name}.replace"), meta("laq")[name]["replace_cases"][case]
    codebook = recorded[f"{case}.codebooks_before"].clone()
    torch.manual_seed(settings["torch_manual_seed"])
    replace_unused_codes_published(codebook, torch.tensor(settings["used_before"]), settings["num_batches"])
    assert torch.allclose(codebook, recorded[f"{case}.codebooks_after"], rtol=0, atol=1e-7)


class CollapseCodebook(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            model.vector_quantizer.codebook[1:] = 1e4


def test_a_collapsed_codebook_stops_the_run(tmp_path):
    def train(**changes):
        settings = {"max_steps": 24, "logging_steps": 4, "codebook_update_interval": 100, "min_perplexity_from": 7}
        return trainer_for(tmp_path, callbacks=[CollapseCodebook()], **{**settings, **changes}).train().global_step

    message = (
        r"perplexity 1.00 at step 12, 1 of 8 codes in use \(stops below `min_perplexity` 2 or 4 codes.*Embeddings differ"
        r".*Try.*`warmup_steps` \(now 0\); `entropy_weight"
    )
    with pytest.raises(CodebookCollapse, match=message):  # by default, from step 1000 on
        train()
    with pytest.raises(CodebookCollapse, match="`codebook_update: reseed`.*`codebook_init_from_data: true`"):
        train(codebook_update="none", codebook_init_from_data=False)
    assert train(min_perplexity_from=1000) == 24
    assert train(min_perplexity=0, min_codes_used=0) == 24
    with pytest.raises(ValueError, match="`min_perplexity` must be at least 1"):
        arguments(tmp_path, min_perplexity=0.5)
    with pytest.raises(ValueError, match="`min_codes_used`"):
        arguments(tmp_path, min_codes_used=1.5)


def test_few_codes_stop_the_run_though_their_perplexity_would_not(tmp_path):
    watchdog = trainer_for(tmp_path, min_perplexity=2.0, min_codes_used=0.5, min_perplexity_from=10).watchdog
    with pytest.raises(CodebookCollapse, match="perplexity 3.00 at step 10, 3 of 8"):
        watchdog.check(10, {}, torch.tensor([50, 50, 50, 0, 0, 0, 0, 0]))
    window = torch.tensor([50, 50, 50, 1, 0, 0, 0, 0])
    watchdog.check(10, {}, window)
    assert not window.any(), "the window has ended"
    # Too few uses to tell a rare code from a dead one: the window grows.
    window[0] += 127
    watchdog.check(12, {}, window)
    window[0] += 1
    with pytest.raises(CodebookCollapse, match="1 of 8"):
        watchdog.check(14, {}, window)


def test_the_watchdog_says_when_the_encoder_died(tmp_path):
    """A dead ReLU gives every pair the same embedding."""

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.bottleneck.convolutions[0].bias.fill_(-100.0)

    sizes = {"bottleneck_activation": "relu"}
    settings = {"max_steps": 24, "logging_steps": 4, "min_perplexity_from": 7}
    message = "every pair the same embedding. Try, in this order: `bottleneck_activation: leaky_relu`"
    with pytest.raises(CodebookCollapse, match=message):
        trainer_for(tmp_path, sizes=sizes, callbacks=[Die()], **settings).train()
    # The slope below zero keeps them apart.
    assert trainer_for(tmp_path, callbacks=[Die()], **settings).train().global_step == 24


def test_the_codebook_is_drawn_from_the_first_steps(tmp_path):
    """Also when the run was interrupted among them."""
    settings = {"max_steps": 5, "codebook_init_batches": 3, "codebook_update_interval": 100, "learning_rate": 1e-5}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    drawn = {}

    def watched(folder, **changes):
        trainer = trainer_for(folder, **{**settings, **changes})
        collect = trainer._collect_first

        def watch(codebook, step, embeddings):
            if step == 3:
                seen = [trainer.codebook_state.first_embeddings, *embeddings]
                drawn["embeddings"] = torch.cat([part.float() for part in seen])
            collect(codebook, step, embeddings)
            if step == 3:
                drawn["codebook"] = codebook.detach().clone()

        trainer._collect_first = watch
        return trainer

    whole = watched(tmp_path / "whole")
    whole.train()
    assert len(drawn["embeddings"]) == 3 * 8 * 4
    distances, nearest = torch.cdist(drawn["codebook"], drawn["embeddings"]).min(1)
    assert distances.max() < 0.05 * drawn["embeddings"].std()
    assert len({int(row) // 32 for row in nearest}) > 1, "only one batch was drawn from"
    assert whole.codebook_state.first_embeddings is None
    # Counting starts when the codebook does; the fifth of five batches has four pairs.
    assert int(whole.codebook_state.usage_counts.sum()) == (8 + 4) * 4
    watched(tmp_path / "parts", callbacks=[StopAt(2)]).train()
    resumed = watched(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.codebook, whole.codebook)
