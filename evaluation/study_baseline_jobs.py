"""What the jobs of the baselines do: models of their own in place of, or beside, the policy's stages."""

from typing import Any

import numpy as np

from lapa.evaluation.study_work import Work


def inverse_dynamics(work: Work) -> dict[str, Any]:
    """VPT's and UniPi's model of which action lies between two frames."""
    from lapa.evaluation.baselines.action_regression import mean_r_squared
    from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
    from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
    from lapa.evaluation.baselines.inverse_dynamics_training import (
        InverseDynamicsSettings,
        label_actions,
        train_inverse_dynamics,
    )
    from lapa.evaluation.baselines.training import Schedule

    recording, held = work.recording("labelled"), work.recording("held_out")
    (episode, first), (_, test) = recording.steps(1), held.steps(1)
    sizes = list(work.settings.inverse_dynamics_sizes)
    config = InverseDynamicsConfig(
        image_size=work.settings.image_size,
        action_dim=work.world.action_dim,
        embedding_size=sizes[0],
        hidden_sizes=sizes,
        depths=[1] * len(sizes),
        stem_pooling=False,
        mlp_hidden_size=128,
    )
    # All labelled episodes are trained on: so few that holding some out costs more than it tells.
    settings = InverseDynamicsSettings(
        Schedule(work.settings.inverse_dynamics_steps, 64, 2e-3, use_cpu=work.use_cpu),
        max_shift=3,
        held_out_share=0.0,
        keep_best=False,
    )
    pairs = recording.frames[first], recording.frames[first + 1]
    folder = work.folder / "model"
    log = train_inverse_dynamics(*pairs, recording.actions[first], config, settings, work.seed, folder, episode)
    predicted = label_actions(
        InverseDynamicsModel.from_pretrained(folder).to(work.device),
        held.frames[test],
        held.frames[test + 1],
        show_progress=False,
    )
    return {"final_loss": log[-1]["loss"], "held_out_r2": mean_r_squared(predicted, held.actions[test])}


def pseudo_actions(work: Work) -> dict[str, Any]:
    """The inverse dynamics model's labels of the video."""
    from lapa.evaluation.baselines.action_regression import mean_r_squared
    from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
    from lapa.evaluation.baselines.inverse_dynamics_training import label_actions

    recording = work.recording("video")
    model = InverseDynamicsModel.from_pretrained(work.inputs["inverse_dynamics"] / "model").to(work.device)
    _, first = recording.steps(1)
    predicted = label_actions(model, recording.frames[first], recording.frames[first + 1])
    actions = np.zeros((len(recording.frames), predicted.shape[1]), np.float32)
    actions[first] = predicted
    work.keep(actions)
    if not len(recording.actions):
        return {}
    # Another embodiment acts in a frame of its own: the two need not agree there.
    return {"video_r2": mean_r_squared(predicted, recording.actions[first])}


def latent_decoder(work: Work) -> dict[str, Any]:
    """What takes stage 3's place where codes are decoded: the labelled steps train a decoder, the policy stays as it is."""
    from lapa.evaluation.baselines.latent_decoder_policy import write_latent_decoder_policy
    from lapa.evaluation.decode_stage import decoder_r2, train_decoder

    settings, folder, quantizer = work.settings, work.folder / "decoder", work.inputs["quantizer"] / "model"
    gap = settings.frame_gap
    log = train_decoder(
        work.recording("labelled"),
        quantizer,
        gap,
        settings.latent_decoder_steps,
        work.seed,
        folder,
        work.inputs["quantizer"].name,
        work.device,
    )
    write_latent_decoder_policy(work.inputs["pretrained"] / "model", folder, work.folder / "model")
    return {
        "final_loss": log[-1]["loss"],
        "decoder_r2": decoder_r2(folder, work.recording("held_out"), quantizer, gap),
    }


def video_model(work: Work) -> dict[str, Any]:
    """UniPi: a video model of the video, which then goes on with the labelled episodes, because the arm is what it must draw."""
    from lapa.evaluation.baselines.configuration_video_diffusion import VideoDiffusionConfig
    from lapa.evaluation.baselines.training import Schedule
    from lapa.evaluation.baselines.unipi import write_unipi
    from lapa.evaluation.baselines.video_diffusion_training import VideoSettings, clip_index, train_video_model

    settings = work.settings
    tokenizer = work.text_tokenizer()
    config = VideoDiffusionConfig(
        image_size=settings.image_size, text_vocab_size=len(tokenizer), **settings.video_model_options
    )
    start, losses = None, {}
    for role, steps in (
        ("video", settings.video_model_steps),
        ("labelled", settings.video_model_finetuning_steps),
    ):
        recording = work.recording(role)
        clips, episode = clip_index(recording.lengths, config.num_frames, config.frame_gap)
        schedule = Schedule(
            steps,
            settings.video_model_batch_size,
            settings.video_model_learning_rate,
            weight_decay=0.01,
            use_cpu=work.use_cpu,
        )
        log = train_video_model(
            recording.frames,
            clips,
            recording.instructions[episode],
            tokenizer,
            config,
            VideoSettings(schedule),
            work.seed,
            work.folder / role,
            start=start,
        )
        start = work.folder / role
        losses[f"loss_on_{role}"] = log[-1]["loss"]
    write_unipi(work.folder / "labelled", work.inputs["inverse_dynamics"] / "model", work.folder / "model")
    return losses


__all__ = ["inverse_dynamics", "latent_decoder", "pseudo_actions", "video_model"]
