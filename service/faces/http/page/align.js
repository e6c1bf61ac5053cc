// Infrared laid on the visible picture by hand: four corners to drag or nudge, and the rig that they come to.
//
// Coordinates are a rig file's: pixels, whole numbers at their centres, so a picture's edge lies at -0.5. A corner is
// where the centre of infrared's corner pixel lies in the visible picture; corners go clockwise from the upper left one.

const MARGIN = 0.1;  // of the visible picture, around it, for corners that lie outside
const CLOSER = 4;  // times, around the handle that is used
const STEP = 1, LONG_STEP = 10;  // visible pixels, of an arrow key
const GROWTH = 1.01;  // of + and -
const MAX_EDGES_SIDE = 1024;  // of the picture that edges are sought in
const ASPECT_TOLERANCE = 0.02;  // the server's, of a rig for other sizes
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const NAMES = ["Upper left", "Upper right", "Lower right", "Lower left"];

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const cornersOf = ([width, height]) => [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]];
const rounded = value => (Math.abs(value) < 1e-12 ? 0 : Number(value.toPrecision(10)));

// A point through a matrix of nine numbers, row by row.
function mapped([a, b, c, d, e, f, g, h, i], [x, y]) {
  const depth = g * x + h * y + i;
  return [(a * x + b * y + c) / depth, (d * x + e * y + f) / depth];
}

// The matrix that takes the corners of a picture of this size to these (Heckbert 1989, from the unit square).
export function matrixOf([width, height], [[x0, y0], [x1, y1], [x2, y2], [x3, y3]]) {
  const [dx1, dy1, dx2, dy2] = [x1 - x2, y1 - y2, x3 - x2, y3 - y2];
  const [dx3, dy3] = [x0 - x1 + x2 - x3, y0 - y1 + y2 - y3];
  const area = dx1 * dy2 - dx2 * dy1;
  const g = (dx3 * dy2 - dx2 * dy3) / area, h = (dx1 * dy3 - dx3 * dy1) / area;
  const [u, v] = [width - 1, height - 1];
  return [
    (x1 - x0 + g * x1) / u, (x3 - x0 + h * x3) / v, x0, (y1 - y0 + g * y1) / u, (y3 - y0 + h * y3) / v, y0, g / u, h / v, 1,
  ];
}

// Whether corners go clockwise around a convex shape, as those of every picture do that two cameras can see.
function isView(corners) {
  return corners.every(([x, y], index) => {
    const [[x1, y1], [x2, y2]] = [corners[(index + 1) % 4], corners[(index + 2) % 4]];
    return (x1 - x) * (y2 - y1) - (y1 - y) * (x2 - x1) > 1;
  });
}

// Where infrared's corners lie if it is scaled to fit into the visible picture.
function fitted([width, height], size) {
  const scale = Math.min(width / size[0], height / size[1]);
  const [left, top] = [(width - scale * size[0]) / 2, (height - scale * size[1]) / 2];
  return cornersOf(size).map(([x, y]) => [scale * (x + 0.5) + left - 0.5, scale * (y + 0.5) + top - 0.5]);
}

// Where a listed rig puts them in pictures of other sizes; null for another aspect ratio.
function laidBy(rig, vis, ir) {
  const [visOwn, irOwn] = [rig.vis_size, rig.ir_size];
  for (const [size, own] of [[vis, visOwn], [ir, irOwn]])
    if (Math.abs(Math.log((size[0] * own[1]) / (size[1] * own[0]))) > Math.log(1 + ASPECT_TOLERANCE)) return null;
  const resized = ([x, y], old, now) => [((x + 0.5) * now[0]) / old[0] - 0.5, ((y + 0.5) * now[1]) / old[1] - 0.5];
  return cornersOf(ir).map(corner => resized(mapped(rig.matrix, resized(corner, ir, irOwn)), visOwn, vis));
}

// Values averaged over five that lie `stride` apart, by 1 4 6 4 1; those at the sides are of no use.
const smoothed = (values, stride) => Float32Array.from(values, (value, at) =>
  (values[at - 2 * stride] + 4 * values[at - stride] + 6 * value + 4 * values[at + stride] + values[at + 2 * stride]) / 16 || 0);

// The edges of a picture, opaque where they are strong, on a canvas that is at most MAX_EDGES_SIDE wide and high.
function drawEdges(canvas, image) {
  const scale = Math.min(1, MAX_EDGES_SIDE / Math.max(image.naturalWidth, image.naturalHeight));
  const width = Math.round(image.naturalWidth * scale), height = Math.round(image.naturalHeight * scale);
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height), { data } = pixels;
  const levels = Float32Array.from({ length: width * height }, (_, at) => data[4 * at] + data[4 * at + 1] + data[4 * at + 2]);
  const grey = smoothed(smoothed(levels, 1), width);
  const strengths = new Float32Array(width * height);
  for (let y = 3; y < height - 3; y++)
    for (let x = 3; x < width - 3; x++) {
      const at = y * width + x, [above, below] = [at - width, at + width];
      const across = grey[above + 1] + 2 * grey[at + 1] + grey[below + 1] - grey[above - 1] - 2 * grey[at - 1] - grey[below - 1];
      const down = grey[below - 1] + 2 * grey[below] + grey[below + 1] - grey[above - 1] - 2 * grey[above] - grey[above + 1];
      strengths[at] = Math.hypot(across, down);
    }
  const strong = Float32Array.from(strengths).sort()[Math.floor(0.95 * strengths.length)] || 1;
  for (let at = 0; at < strengths.length; at++)
    data.set([255, 64, 24, 255 * Math.min(1, (strengths[at] / strong) ** 2)], 4 * at);
  context.putImageData(pixels, 0, 0);
}

export class Aligner {
  #root; #plate; #onChange;
  #vis = null; #ir = null;  // sizes; null without a pair that can be seen
  #rigs = []; #base = null;  // the rig that was begun with
  #corners = []; #active = 4;
  #closeTo = null;  // the point in the middle of a closer look, which stays while a handle moves; null for all of it
  #handles = []; #fields = [];  // #fields[corner] = [x, y], inputs

  // onChange is called when another rig has come of it.
  constructor(root, onChange) {
    this.#root = root;
    this.#plate = this.#part(".plate");
    this.#onChange = onChange;
    this.#handles = [...this.#plate.querySelectorAll("button")];
    for (const [index, handle] of this.#handles.entries()) this.#wire(handle, index);
    for (const name of NAMES) this.#fields.push(this.#addFields(name));
    this.#part("[name=begin]").addEventListener("change", () => this.#begin());
    this.#part(".again").addEventListener("click", () => this.#begin());
    this.#part(".closer").addEventListener("click", event => {
      this.#closeTo = this.#closeTo || !this.#vis ? null : this.#pointOf(this.#active);
      event.target.setAttribute("aria-pressed", this.#closeTo !== null);
      this.#place();
    });
    for (const control of root.querySelectorAll("[name=view], [name=opacity]"))
      control.addEventListener("input", () => this.#showView());
    this.#part(".copy").addEventListener("click", () => this.#copy());
    new ResizeObserver(() => this.#place()).observe(this.#plate);
  }

  // Pictures of a pair, or null; what was laid is kept for those of the same sizes.
  show(vis, ir) {
    const isSeen = Boolean(vis?.url && ir?.url), before = String([this.#vis, this.#ir]);
    [this.#vis, this.#ir] = isSeen ? [vis.dimensions, ir.dimensions] : [null, null];
    for (const [role, picture] of [["vis", vis], ["ir", ir]]) {
      const image = this.#part(`.${role}`);
      if (isSeen) image.src = picture.url;
      else image.removeAttribute("src");
    }
    this.#part("canvas").width = 0;  // edges of another picture
    this.#part(".unseen-pair").hidden = isSeen;
    this.#part(".work").hidden = !isSeen;
    if (isSeen) this.#plate.style.setProperty("--shape", this.#vis.join(" / "));
    if (isSeen && String([this.#vis, this.#ir]) !== before) this.#begin();
    else this.#place();
    this.#showView();
  }

  // The rigs that may be begun with.
  set rigs(rigs) {
    const select = this.#part("[name=begin]"), chosen = select.value;
    this.#rigs = rigs;
    select.replaceChildren(select.options[0]);
    for (const rig of rigs) {
      const option = new Option(rig.has_distortion ? `${rig.name}, whose lens bends` : rig.name, rig.name);
      option.disabled = rig.has_distortion;
      select.append(option);
    }
    select.value = rigs.some(rig => rig.name === chosen) ? chosen : "";
  }

  beginWith(name) {
    const select = this.#part("[name=begin]");
    select.value = name;
    if (select.selectedOptions[0]?.disabled ?? true) select.value = "";
    this.#begin();
  }

  // What a request says as `rig`; empty without a pair that can be seen.
  get rig() {
    if (!this.#vis) return "";
    return typeof this.#base?.parallax_px === "number" ? JSON.stringify(this.#file) : this.#matrix.join(",");
  }

  get #matrix() { return matrixOf(this.#ir, this.#corners).map(rounded); }

  // Four corners determine a rig and leave nothing that would check it, so it is not sure.
  get #file() {
    const matrix = this.#matrix, parallax = this.#base?.parallax_px;
    return {
      format: "recofuse-rig", version: 1, date: new Date().toISOString().slice(0, 10), method: "corners", is_sure: false,
      num_pairs: 1, vis_size: this.#vis, ir_size: this.#ir, matrix: [0, 3, 6].map(row => matrix.slice(row, row + 3)),
      ...(typeof parallax === "number" && { parallax_px: rounded((parallax * this.#vis[0]) / this.#base.vis_size[0]) }),
    };
  }

  #part(selector) { return this.#root.querySelector(selector); }

  #begin() {
    if (!this.#vis) return;
    const rig = this.#rigs.find(({ name }) => name === this.#part("[name=begin]").value);
    const corners = rig && laidBy(rig, this.#vis, this.#ir);
    this.#base = corners ? rig : null;
    const sizes = rig && `${rig.vis_size.join(" × ")} and ${rig.ir_size.join(" × ")}`;
    this.#say(rig && !corners ? `${rig.name} is for pictures of another shape, ${sizes}; scaled to fit instead.` : "");
    this.#corners = corners ?? fitted(this.#vis, this.#ir);
    this.#closeTo &&= this.#pointOf(this.#active);
    this.#changed();
  }

  // Takes corners, unless they fold the picture over. Returns whether it did.
  #take(corners) {
    if (!corners.flat().every(Number.isFinite) || !isView(corners)) return false;
    this.#corners = corners;
    this.#say("");
    this.#changed();
    return true;
  }

  // One corner, or all of them with the ring's number.
  #moveBy(index, x, y) {
    return this.#take(this.#corners.map(([left, top], at) => (index === 4 || index === at ? [left + x, top + y] : [left, top])));
  }

  #grow(factor) {
    const [x, y] = this.#middle;
    this.#take(this.#corners.map(([left, top]) => [x + (left - x) * factor, y + (top - y) * factor]));
  }

  get #middle() { return mapped(matrixOf([2, 2], this.#corners), [0.5, 0.5]); }

  #pointOf(index) { return index === 4 ? this.#middle : this.#corners[index]; }

  #wire(handle, index) {
    let last = null;
    handle.addEventListener("pointerdown", event => {
      if (event.button !== 0) return;
      handle.setPointerCapture(event.pointerId);
      last = [event.clientX, event.clientY];
    });
    handle.addEventListener("pointermove", event => {
      if (!last) return;
      const { scale } = this.#sight, now = [event.clientX, event.clientY];
      if (this.#moveBy(index, (now[0] - last[0]) / scale, (now[1] - last[1]) / scale)) last = now;
    });
    for (const end of ["pointerup", "pointercancel"]) handle.addEventListener(end, () => { last = null; });
    handle.addEventListener("focus", () => {
      this.#active = index;
      if (!this.#closeTo || last) return;  // what is dragged must not go from under the pointer
      this.#closeTo = this.#pointOf(index);
      this.#place();
    });
    handle.addEventListener("keydown", event => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key in ARROWS) {
        const step = event.shiftKey ? LONG_STEP : STEP;
        this.#moveBy(index, ...ARROWS[event.key].map(direction => direction * step));
      } else if (index === 4 && ["+", "=", "-"].includes(event.key)) {
        this.#grow(event.key === "-" ? 1 / GROWTH : GROWTH);
      } else {
        return;
      }
      event.preventDefault();
    });
  }

  #addFields(name) {
    const group = document.createElement("fieldset"), legend = document.createElement("legend");
    legend.textContent = name;
    group.append(legend);
    this.#part(".corners").append(group);
    const index = this.#fields.length;
    return ["x", "y"].map((axis, at) => {
      const label = document.createElement("label"), input = document.createElement("input");
      label.textContent = axis;
      [input.type, input.inputMode, input.maxLength] = ["text", "decimal", 12];
      input.setAttribute("aria-label", `${name}, ${axis}`);
      input.addEventListener("change", () => {
        const moved = this.#corners.map(corner => [...corner]);
        moved[index][at] = input.value.trim() === "" ? NaN : Number(input.value.replace(",", "."));
        if (this.#take(moved)) return;
        this.#place();
        this.#say("That is no place for this corner: the picture would be folded over.");
      });
      label.append(input);
      group.append(label);
      return input;
    });
  }

  #changed() {
    this.#place();
    this.#onChange();
  }

  // How visible pixels become the plate's: by scale, from the left and the top.
  get #sight() {
    const { clientWidth, clientHeight } = this.#plate, [width, height] = this.#vis;
    const [centreX, centreY] = this.#closeTo ?? [width / 2 - 0.5, height / 2 - 0.5];
    const fit = Math.min(clientWidth / width, clientHeight / height) / (1 + 2 * MARGIN);
    const scale = (this.#closeTo ? CLOSER : 1) * fit;
    return { scale, left: clientWidth / 2 - (centreX + 0.5) * scale, top: clientHeight / 2 - (centreY + 0.5) * scale };
  }

  #place() {
    if (!this.#vis) return;
    const { scale, left, top } = this.#sight, [width, height] = this.#ir;
    const vis = this.#part(".vis"), [a, b, c, d, e, f, g, h, i] = matrixOf(this.#ir, this.#corners);
    Object.assign(vis.style, { width: `${this.#vis[0]}px`, height: `${this.#vis[1]}px` });
    vis.style.transform = `translate(${left}px, ${top}px) scale(${scale})`;
    // From the picture's edge to its pixels' centres, through the matrix, and to the plate.
    const [x, y] = [0.5 * scale + left, 0.5 * scale + top];
    const rows = [[scale * a + x * g, scale * b + x * h, scale * c + x * i], [scale * d + y * g, scale * e + y * h, scale * f + y * i],
      [g, h, i]].map(([u, v, w]) => [u, v, w - 0.5 * (u + v)]);
    const [p, q, r] = rows, transform = [p[0], q[0], 0, r[0], p[1], q[1], 0, r[1], 0, 0, 1, 0, p[2], q[2], 0, r[2]];
    for (const layer of [this.#part(".ir"), this.#part("canvas")]) {
      Object.assign(layer.style, { width: `${width}px`, height: `${height}px` });
      layer.style.transform = `matrix3d(${transform.map(value => value.toFixed(12)).join(", ")})`;
    }
    const { clientWidth, clientHeight } = this.#plate;
    for (const [index, handle] of this.#handles.entries()) {
      const [u, v] = this.#pointOf(index);
      handle.style.left = `${clamp((u + 0.5) * scale + left, 0, clientWidth)}px`;
      handle.style.top = `${clamp((v + 0.5) * scale + top, 0, clientHeight)}px`;
    }
    for (const [index, fields] of this.#fields.entries())
      for (const [at, input] of fields.entries()) input.value = this.#corners[index][at].toFixed(1);
    this.#part(".matrix").textContent = this.#matrix.join(", ");
    const link = this.#part("a");
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(new Blob([`${JSON.stringify(this.#file, null, 2)}\n`], { type: "application/json" }));
  }

  #showView() {
    const view = this.#part("[name=view]:checked").value, canvas = this.#part("canvas"), image = this.#part(".ir");
    canvas.hidden = view !== "edges";
    image.hidden = view === "edges";
    image.classList.toggle("blinking", view === "blink");
    image.style.opacity = view === "blend" ? this.#part("[name=opacity]").value / 100 : "";
    this.#part("[name=opacity]").disabled = view !== "blend";
    if (view === "edges" && this.#ir && !canvas.width) image.decode().then(() => drawEdges(canvas, image), () => {});
  }

  #say(text) { this.#part(".told").textContent = text; }

  async #copy() {
    try {
      await navigator.clipboard.writeText(`${JSON.stringify(this.#file, null, 2)}\n`);
      this.#say("Copied");
    } catch {  // beyond loopback the clipboard needs https
      this.#say("The browser does not let this page copy; save the file instead.");
    }
  }
}
