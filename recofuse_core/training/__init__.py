"""Training in stages, from one config: tone, autoencoder, branches, coupled (the paper's alternating regularisation).

- "exposure" is ours, for models that have an exposure estimator: see exposure.py and docs/decisions/0015.
- "tone" is ours, for models that have a tone estimator (docs/decisions/0005). Features and sampled cells of many
  degraded frames are drawn once and kept, so that a step costs milliseconds (tone.py).
- "autoencoder": every latent is decoded with degraded skip features and must give the image it belongs to (feature
  reorganisation), so that content and degradation live in the latent and the decoder learns to distrust the skips.
- "branches": the autoencoder is frozen; states of random steps are drawn from the marginal, and the prediction is
  compared with the clean latent ("clean" denoisers) or with the optimum step of the own state ("noise", as published).
- "coupled": a restoration update of both branches and TIM, then a fusion update of TIM, within every iteration. With
  `rollout` set, states come from the sampler's own trajectory instead of the marginal and the loss is taken in the
  image too, with gradients through all its steps; this closes the gap between training and few-step sampling, and lets
  the decoder meet the latents that it will be given (docs/decisions/0003).
- "detail" is ours, for models that have gates for it: they alone learn, from what the frozen networks deliver, some of
  it of sharp photographs (docs/decisions/0050).

A configuration file (config.py) says which stages there are. Batches come from pairs.py, or encoded once from
latents.py; objectives.py has the losses, trainer.py the loop over them. A stage yields a StepReport after each step;
`run.train_from_config` adds checkpoints, a progress bar and TensorBoard. ablations.py trains the paper's Models I to
VIII. All randomness is one torch.Generator whose state is saved, so a resumed run goes on exactly where it stopped.

Where a torch.distributed group is initialised, every process of it draws batches of its own and gradients are averaged,
so that N processes train on N times the batch; the first one alone writes files.
"""
