// Pictures of one view under a common zoom: two under a dividing line, or all of them in panes that move in step.

const MAX_PIXEL = 32;  // screen pixels to a picture's pixel
const STEP = 1.5;  // of a key or button
const IS_PIXELATED_FROM = 3;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function make(name, className, parent) {
  const element = document.createElement(name);
  element.className = className;
  parent?.append(element);
  return element;
}

export class Viewer {
  #stage; #onZoom;
  #layers = [];  // { id, label, url, note }; url is empty where a browser cannot show the picture
  #size = [4, 3];  // of the visible picture, which all others are laid over
  #panes = [];  // { element, images }
  #layout = "slider"; #sides = ["", ""];
  #view = { zoom: 1, u: 0.5, v: 0.5 };  // zoom: 1 fits the pane; u, v: what is at its middle, in [0, 1]
  #line = 0.5; #over = null; #handle = null;
  #pointers = new Map(); #isOnLine = false;

  // onZoom is told how many screen pixels a picture's pixel takes; null without a picture.
  constructor(stage, onZoom) {
    this.#stage = stage;
    this.#onZoom = onZoom;
    new ResizeObserver(() => this.#place()).observe(stage);
    stage.addEventListener("keydown", event => this.#onKey(event));
  }

  // size: [width, height] of the visible picture. The zoom is kept unless the size changes.
  show(layers, size, sides) {
    if (String(size) !== String(this.#size)) this.#view = { zoom: 1, u: 0.5, v: 0.5 };
    [this.#layers, this.#size, this.#sides] = [layers, size, sides];
    this.#build();
  }

  set layout(layout) { this.#layout = layout; this.#build(); }

  set sides(sides) { this.#sides = sides; this.#build(); }

  fit() { this.#look({ zoom: 1, u: 0.5, v: 0.5 }); }

  zoomIn() { this.#zoomTo(this.#view.zoom * STEP); }

  zoomOut() { this.#zoomTo(this.#view.zoom / STEP); }

  #build() {
    const hadFocus = this.#handle !== null && this.#handle === document.activeElement;
    this.#panes = [];
    this.#over = this.#handle = null;
    this.#pointers.clear();
    this.#stage.replaceChildren();
    this.#stage.classList.toggle("panes", this.#layout === "panes");
    this.#stage.style.setProperty("--shape", `${this.#size[0]} / ${this.#size[1]}`);
    if (this.#layout === "panes") {
      for (const layer of this.#layers) this.#tag(this.#image(this.#pane(), layer), layer, "at-left");
    } else if (this.#layers.length) {
      const pane = this.#pane();
      const [left, right] = this.#sides.map(id => this.#layers.find(layer => layer.id === id));
      if (left) this.#tag(this.#image(pane, left), left, "at-left");
      if (left && right && left !== right) {
        this.#over = make("div", "over", pane.element);
        this.#image(pane, right, this.#over);
        this.#tag(pane, right, "at-right");
        this.#handle = this.#line_(pane, left, right);
        if (hadFocus) this.#handle.focus();
      }
    }
    if (this.#panes.every(pane => !pane.element.childElementCount)) {
      this.#stage.replaceChildren();
      this.#panes = [];
      const isUnseen = this.#layers.length > 0;
      make("p", "empty", this.#stage).textContent = isUnseen ? "No preview of these. Fuse them to see what comes of it." :
        "The pictures appear here.";
    }
    this.#moveLine(this.#line);
    this.#place();
  }

  #pane() {
    const element = make("div", "pane", this.#stage);
    const pane = { element, images: [] };
    element.addEventListener("pointerdown", event => this.#onDown(event, pane));
    element.addEventListener("pointermove", event => this.#onMove(event, pane));
    for (const end of ["pointerup", "pointercancel"])
      element.addEventListener(end, event => { this.#pointers.delete(event.pointerId); this.#isOnLine = false; });
    element.addEventListener("wheel", event => this.#onWheel(event, pane), { passive: false });
    element.addEventListener("dblclick", event => this.#zoomTo(this.#view.zoom * 2, pane, ...this.#inside(event, pane)));
    this.#panes.push(pane);
    return pane;
  }

  #image(pane, layer, parent = pane.element) {
    if (!layer.url) {
      make("p", "empty", parent).textContent = layer.note;
      return pane;
    }
    const image = make("img", "", parent);
    image.src = layer.url;
    image.alt = layer.label;
    image.draggable = false;
    pane.images.push(image);
    return pane;
  }

  #tag(pane, layer, side) {
    make("span", `tag ${side}`, pane.element).textContent = layer.label;
  }

  #line_(pane, left, right) {
    const handle = make("div", "line", pane.element);
    const attributes = { role: "slider", tabindex: "0", "aria-valuemin": "0", "aria-valuemax": "100",
      "aria-orientation": "horizontal", "aria-label": `Line between ${left.label} and ${right.label}` };
    for (const [name, value] of Object.entries(attributes)) handle.setAttribute(name, value);
    return handle;
  }

  #moveLine(share) {
    this.#line = clamp(share, 0, 1);
    if (!this.#handle) return;
    const percent = Math.round(this.#line * 100);
    this.#over.style.clipPath = `inset(0 0 0 ${this.#line * 100}%)`;
    this.#handle.style.left = `${this.#line * 100}%`;
    this.#handle.setAttribute("aria-valuenow", percent);
    this.#handle.setAttribute("aria-valuetext", `${percent} % left picture, ${100 - percent} % right`);
  }

  // Width and height of the picture in a pane at zoom 1, in screen pixels.
  #fitted(pane) {
    const { clientWidth, clientHeight } = pane.element;
    const scale = Math.min(clientWidth / this.#size[0], clientHeight / this.#size[1]) || 1;
    return [this.#size[0] * scale, this.#size[1] * scale, scale];
  }

  #corner(pane) {
    const [width, height] = this.#fitted(pane), { zoom, u, v } = this.#view;
    return [pane.element.clientWidth / 2 - u * width * zoom, pane.element.clientHeight / 2 - v * height * zoom];
  }

  #place() {
    for (const pane of this.#panes) {
      const [width, height, scale] = this.#fitted(pane), [left, top] = this.#corner(pane), { zoom } = this.#view;
      for (const image of pane.images) {
        Object.assign(image.style, { width: `${width}px`, height: `${height}px` });
        image.style.transform = `translate(${left}px, ${top}px) scale(${zoom})`;
        image.classList.toggle("pixelated", zoom * scale >= IS_PIXELATED_FROM);
      }
    }
    this.#stage.classList.toggle("zoomed", this.#view.zoom > 1);
    this.#onZoom(this.#panes.length ? this.#view.zoom * this.#fitted(this.#panes[0])[2] : null);
  }

  // Go to a view, as far as the pictures reach.
  #look({ zoom, u, v }) {
    if (!this.#panes.length) return;
    const pane = this.#panes[0], [width, height, scale] = this.#fitted(pane);
    zoom = clamp(zoom, 1, Math.max(1, MAX_PIXEL / scale));
    const reach = [pane.element.clientWidth / (width * zoom), pane.element.clientHeight / (height * zoom)];
    const [halfU, halfV] = reach.map(share => Math.min(0.5, share / 2));
    this.#view = { zoom, u: clamp(u, halfU, 1 - halfU), v: clamp(v, halfV, 1 - halfV) };
    this.#place();
  }

  // Zoom with the point x, y of a pane staying where it is; its middle if none is given.
  #zoomTo(zoom, pane = this.#panes[0], x = undefined, y = undefined) {
    if (!pane) return;
    const [width, height, scale] = this.#fitted(pane), [left, top] = this.#corner(pane), old = this.#view.zoom;
    const middle = [pane.element.clientWidth / 2, pane.element.clientHeight / 2];
    [x, y] = [x ?? middle[0], y ?? middle[1]];
    zoom = clamp(zoom, 1, Math.max(1, MAX_PIXEL / scale));
    const [pointU, pointV] = [(x - left) / (width * old), (y - top) / (height * old)];
    this.#look({ zoom, u: pointU + (middle[0] - x) / (width * zoom), v: pointV + (middle[1] - y) / (height * zoom) });
  }

  #moveBy(x, y, pane) {
    const [width, height] = this.#fitted(pane), { zoom, u, v } = this.#view;
    this.#look({ zoom, u: u - x / (width * zoom), v: v - y / (height * zoom) });
  }

  #inside(event, pane) {
    const box = pane.element.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  #onDown(event, pane) {
    if (event.button !== 0) return;
    pane.element.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, this.#inside(event, pane));
    const isLine = event.target === this.#handle;
    this.#isOnLine = this.#pointers.size === 1 && this.#handle !== null && (isLine || this.#view.zoom === 1);
    (isLine ? this.#handle : this.#stage).focus({ preventScroll: true, focusVisible: false });
    if (this.#isOnLine && !isLine) this.#onMove(event, pane);
    event.preventDefault();
  }

  #onMove(event, pane) {
    const before = this.#pointers.get(event.pointerId);
    if (!before) return;
    const now = this.#inside(event, pane);
    const other = [...this.#pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.#pointers.set(event.pointerId, now);
    if (other) {
      const spread = point => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
      const middle = [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2];
      this.#moveBy((now[0] - before[0]) / 2, (now[1] - before[1]) / 2, pane);
      this.#zoomTo((this.#view.zoom * spread(now)) / spread(before), pane, ...middle);
    } else if (this.#isOnLine) {
      this.#moveLine(now[0] / pane.element.clientWidth);
    } else {
      this.#moveBy(now[0] - before[0], now[1] - before[1], pane);
    }
  }

  // A wheel scrolls the page until the pictures have been clicked, or while there is nothing left to zoom out of.
  #onWheel(event, pane) {
    const isOurs = event.ctrlKey || this.#stage.contains(document.activeElement);
    if (!isOurs || (!event.ctrlKey && event.deltaY > 0 && this.#view.zoom === 1)) return;
    event.preventDefault();
    const pixels = event.deltaY * (event.deltaMode === 1 ? 30 : 1);
    const factor = Math.exp(-pixels * (event.ctrlKey ? 0.01 : 0.002));
    this.#zoomTo(this.#view.zoom * factor, pane, ...this.#inside(event, pane));
  }

  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "+" || event.key === "=") this.zoomIn();
    else if (event.key === "-") this.zoomOut();
    else if (event.key === "0") this.fit();
    else if (event.target === this.#handle ? !this.#onLineKey(event) : !this.#onPanKey(event)) return;
    event.preventDefault();
  }

  #onLineKey({ key, shiftKey }) {
    const step = shiftKey ? 0.1 : 0.02;
    const shares = { ArrowLeft: this.#line - step, ArrowDown: this.#line - step, ArrowRight: this.#line + step,
      ArrowUp: this.#line + step, PageDown: this.#line - 0.1, PageUp: this.#line + 0.1, Home: 0, End: 1 };
    if (!(key in shares)) return false;
    this.#moveLine(shares[key]);
    return true;
  }

  #onPanKey({ key }) {
    const directions = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    if (!(key in directions) || this.#view.zoom === 1 || !this.#panes.length) return false;
    const { clientWidth, clientHeight } = this.#panes[0].element;
    this.#moveBy(directions[key][0] * clientWidth * 0.1, directions[key][1] * clientHeight * 0.1, this.#panes[0]);
    return true;
  }
}
