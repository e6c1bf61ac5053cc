"""Procedural night and dusk streets: registered, clean visible/infrared pairs for tests, demos and documentation.

One scene description, drawn from a seed, is rendered twice: light for vis, heat for ir. So the two are registered
by construction and disagree where the real modalities do: a lit sign is cold, a pedestrian in dark clothes is hot, a
lane marking is nearly invisible in ir.

How it works: a pinhole camera stands on the centre line of a straight street (street.py). The backdrop (ground,
facades, sky) is ray-cast in closed form into per-pixel albedo, emission and heat (backdrop.py, facades.py), textured in
metres and filtered by the pixel's footprint (patterns.py); lamps light it. Everything that stands in the street (cars,
people, trees, lamps) is made of polygons in metres (figures.py), painted from far to near (canvas.py). A film curve
maps light to [0, 1] (scene.py, where `make_scene` is).

Not photographs: use them to see that a pipeline works, never to claim quality. World axes: X right, Y up from the
ground, Z forward, in metres; light is linear RGB, heat is in [0, 1].
"""
