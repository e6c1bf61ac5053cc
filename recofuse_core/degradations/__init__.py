"""Seeded physical degradations of clean visible and infrared images, each with its model and range.

recipes.py has `degrade_vis` and `degrade_ir`, which draw a recipe and apply it in the order in which light meets lens,
scene, sensor and codec: blur, then low light, haze, rain, snow or their dense forms (infrared: low contrast), then
colour cast, stripes, fixed pattern, noise, dead pixels, JPEG, rounding to 8 bit. Recipes are drawn from the kinds that
have a weight there; weather but for haze, fixed pattern and dead pixels come only when asked for by name. physics.py
has the single functions, which take explicit parameters; weather.py has what fog, dense rain and snow look like.
docs/degradations.md shows each.

All randomness comes from the `torch.Generator` passed in (a CPU generator); images are CPU float32 in [0, 1]. Letters:
C channels (3 vis, 1 ir), H and W height and width, at least 16.
"""
