// The playground: choose a pair, fuse it, compare. Text of the server is only ever shown as text.

import { Aligner } from "./align.js";
import { Client, Problem } from "./client.js";
import { curlOf, pictureOfNpy, sizeOf, unzip, whyUnseen } from "./files.js";
import { Viewer } from "./viewer.js";

const HAND = ":hand";  // in place of a rig's name, which holds no colon
const SAMPLES = [["night", "Night"], ["haze", "Haze"], ["noise", "Noise"], ["dusk", "Dusk"]];
const INPUTS = { vis: "Visible", ir: "Infrared" };
const ROLES = Object.keys(INPUTS);
const PARTS = { vis: "Visible, restored", ir: "Infrared, restored", fused: "Fused" };
const NAMES = { fused: "fused", vis: "vis-restored", ir: "ir-restored" };  // of files
const STAGES = { decode: "Decoding", queue: "Queue", batch: "Batching", model: "Model", encode: "Encoding" };
// What was read of the infrared file, if it is not just its grey values.
const SOURCES = { raw: "the camera’s own values in the file", palette: "a false-colour picture, turned back into intensity" };
const looksInfrared = name => /(^|[^a-z])(ir|inf|infra|infrared|thermal|therm|lwir|mwir|flir)([^a-z]|$)/i.test(name);

const $ = id => document.getElementById(id);
const form = $("form");
const client = new Client();
const viewer = new Viewer($("stage"), pixel => { $("zoom").value = pixel === null ? "–" : `${Math.round(pixel * 100)} %`; });

const aligner = new Aligner($("aligner"), () => showCommand());
let namedRig = "";  // what was chosen last before `HAND`

const pair = { vis: null, ir: null };  // { file, url, note, href }: href of a sample, url empty without a preview
let size = [4, 3];
let result = null;  // { layers, files: [[name, url]] } of the pair that is shown
let sides = ["", ""];
let needsKey = false, canRead = true;
let asked = Promise.resolve();  // for the models, which tells what the key may do
let running = null;  // AbortController
// Of choosing, and of fusing: what arrives late must replace neither a later choice nor a pair that is being fused.
const turns = { vis: 0, ir: 0 };

function make(name, text, parent) {
  const element = document.createElement(name);
  element.textContent = text;
  parent?.append(element);
  return element;
}

// the pair

// A file as a picture of the pair.
async function pictureOf(file, href = "") {
  const whyNot = await whyUnseen(file);
  let url = whyNot ? "" : URL.createObjectURL(file);
  let note = whyNot, dimensions = null;
  if (url) {
    try {
      dimensions = await sizeOf(url);
      note = `${dimensions.join(" × ")}, ${bytesOf(file.size)}`;
    } catch {
      URL.revokeObjectURL(url);
      [url, note] = ["", "No preview; the server will say if it can read it"];
    }
  }
  return { file, url, note, dimensions, href };
}

// Begins a choice for these roles; returns what tells if it is still a role's latest.
function begin(roles) {
  const mine = Object.fromEntries(roles.map(role => [role, ++turns[role]]));
  return role => mine[role] === turns[role];
}

function forget(role) {
  if (pair[role]?.url) URL.revokeObjectURL(pair[role].url);
  pair[role] = null;
}

// Own files, by role; a sample's other half does not stay beside them.
async function chooseFiles(files) {
  const chosen = Object.keys(files).filter(role => files[role]);
  const isLatest = begin(chosen);
  const pictures = await Promise.all(chosen.map(role => pictureOf(files[role])));
  if (chosen.some(isLatest)) for (const role of ROLES) if (pair[role]?.href) forget(role);
  for (const [index, role] of chosen.entries()) put(role, pictures[index], isLatest(role));
  if (chosen.some(isLatest)) showPair();
}

// Puts a picture in its place, or lets go of one that came too late.
function put(role, picture, isWanted) {
  if (isWanted) {
    forget(role);
    pair[role] = picture;
  } else if (picture.url) {
    URL.revokeObjectURL(picture.url);
  }
}

function assign(files) {
  const [first, second] = files;
  if (!second) {
    const role = looksInfrared(first.name) || (pair.vis && !pair.vis.href && !pair.ir) ? "ir" : "vis";
    return { [role]: first };
  }
  return looksInfrared(first.name) && !looksInfrared(second.name) ? { vis: second, ir: first } : { vis: first, ir: second };
}

async function chooseSample(name) {
  const load = async role => {
    const href = new URL(`playground/samples/${name}-${role}.webp`, document.baseURI).href;
    const answer = await fetch(href);
    if (!answer.ok) throw new Problem({ title: "The sample is missing", detail: `The server answered ${answer.status}.` });
    return [new File([await answer.blob()], `${name}-${role}.webp`, { type: "image/webp" }), href];
  };
  const isLatest = begin(ROLES);
  try {
    const files = await Promise.all(ROLES.map(load));
    const pictures = await Promise.all(files.map(([file, href]) => pictureOf(file, href)));
    const isWanted = ROLES.every(isLatest);
    for (const [index, role] of ROLES.entries()) put(role, pictures[index], isWanted);
    if (!isWanted) return;
    showPair();
    for (const button of document.querySelectorAll(".samples button"))
      button.setAttribute("aria-pressed", button.dataset.name === name);
  } catch (error) {
    if (!ROLES.every(isLatest)) return;
    complain(error instanceof Problem ? error : new Problem({ title: "No connection", detail: "The sample cannot be loaded." }));
  }
}

function showPair() {
  dropResult();
  complain(null);
  say("");
  $("progress").hidden = true;
  for (const role of ROLES) {
    const slot = $(`${role}-slot`), picture = pair[role];
    const preview = slot.querySelector(".preview");
    preview.replaceChildren();
    if (picture?.url) {
      const image = make("img", "", preview);
      image.src = picture.url;
      image.alt = "";
    }
    slot.classList.toggle("filled", picture !== null);
    $(`${role}-note`).replaceChildren();
    if (picture) make("strong", picture.file.name, $(`${role}-note`));
    make("span", picture ? picture.note : "Drop a file or choose one", $(`${role}-note`));
    if (!picture) $(role).value = "";
  }
  for (const button of document.querySelectorAll(".samples button")) button.setAttribute("aria-pressed", "false");
  size = pair.vis?.dimensions ?? pair.ir?.dimensions ?? [4, 3];
  showPictures(["vis-in", "ir-in"]);
  aligner.show(pair.vis, pair.ir);
  showCommand();
}

// the comparison

function showPictures(wanted) {
  const layers = [];
  for (const [role, label] of Object.entries(INPUTS))
    if (pair[role]) layers.push({ id: `${role}-in`, label: `${label}, as given`, url: pair[role].url, note: pair[role].note });
  layers.push(...(result?.layers ?? []));
  const visible = layers.filter(layer => layer.url);
  sides = wanted.map((id, index) => (visible.find(layer => layer.id === id) ?? visible.at(index ? -1 : 0))?.id ?? "");
  for (const [index, side] of ["left", "right"].entries()) {
    $(side).replaceChildren(...visible.map(layer => new Option(layer.label, layer.id, false, layer.id === sides[index])));
    $(side).disabled = visible.length < 2;
  }
  viewer.show(layers, size, sides);
}

function dropResult() {
  for (const [, url] of result?.files ?? []) URL.revokeObjectURL(url);
  for (const layer of result?.layers ?? []) if (layer.url) URL.revokeObjectURL(layer.url);
  result = null;
  $("outcome").hidden = $("warnings").hidden = true;
}

async function showResult(answer, wanted, tookMs) {
  const suffix = wanted.format, base = pair.vis.file.name.replace(/([-_. ](vis|visible|rgb))?\.[^.]*$/i, "");
  const blobs = new Map();
  let alarm, values;
  const files = [];
  const offer = (name, blob) => files.push([name, URL.createObjectURL(blob), blob.size]);
  if (answer.isZip) {
    const entries = await unzip(answer.blob);
    for (const part of Object.keys(PARTS))
      if (entries.has(`${part}.${suffix}`)) blobs.set(part, entries.get(`${part}.${suffix}`));
    offer(`${base}-recofuse.zip`, answer.blob);
    ({ alarm, values } = JSON.parse(await entries.get("result.json").text()));
    if (values) offer(`${base}-${values.file}`, entries.get(values.file));
  } else {
    blobs.set(wanted.output, answer.blob);
  }
  const layers = [];
  for (const part of Object.keys(PARTS).filter(part => blobs.has(part))) {
    const blob = blobs.get(part);
    offer(`${base}-${NAMES[part]}.${suffix}`, blob);
    const picture = suffix === "npy" ? await pictureOfNpy(blob) : new Blob([blob], { type: `image/${suffix}` });
    const url = URL.createObjectURL(picture);
    const dimensions = await sizeOf(url);
    if (!pair.vis.dimensions) size = dimensions;
    layers.push({ id: part, label: PARTS[part], url });
  }
  dropResult();
  result = { layers, files };
  const shown = layers.find(layer => layer.id === "fused") ?? layers[0];
  showPictures([shown.id === "ir" ? "ir-in" : "vis-in", shown.id]);
  showTimes(answer, tookMs);
  if (answer.alignment) $("facts").textContent += ` Infrared: ${answer.alignment}.`;
  if (alarm) $("facts").textContent += ` ${wordsOf(alarm)}`;
  $("warnings").replaceChildren();
  for (const warning of answer.warnings) make("li", warning, $("warnings"));
  $("warnings").hidden = !answer.warnings.length;
  $("files").replaceChildren();
  for (const [name, url, numBytes] of files) {
    const line = make("li", "", $("files"));
    const link = make("a", name, line);
    [link.href, link.download] = [url, name];
    make("span", bytesOf(numBytes), line);
  }
  $("outcome").hidden = false;
}

function showTimes(answer, tookMs) {
  const body = $("times").tBodies[0];
  body.replaceChildren();
  const longest = Math.max(...answer.timing.map(([, ms]) => ms), 1);
  for (const [stage, ms] of answer.timing) {
    const row = make("tr", "", body);
    make("th", STAGES[stage] ?? stage, row).scope = "row";
    make("td", msOf(ms), row);
    const cell = make("td", "", row);
    cell.setAttribute("aria-hidden", "true");
    const bar = make("span", "", cell);
    bar.className = ms === longest ? "bar most" : "bar";
    bar.style.width = `${(100 * ms) / longest}%`;
  }
  const row = make("tr", "", body);
  row.className = "total";
  make("th", "In all", row).scope = "row";
  make("td", msOf(tookMs), row);
  make("td", "", row);
  const read = SOURCES[answer.irSource] ? ` Infrared read: ${SOURCES[answer.irSource]}.` : "";
  $("facts").textContent = `${answer.model}, ${size.join(" × ")}.${read} “In all” is this browser’s clock, from the click to the picture.`;
}

function wordsOf({ threshold, unit, num_regions, area, hottest }) {
  const degrees = unit === "celsius" ? " °C" : "";
  const found = num_regions ? `${num_regions} of ${area} pixels, the hottest ${hottest.toFixed(1)}${degrees}` : "none";
  return `Regions of ${threshold}${degrees} or more: ${found}.`;
}

const bytesOf = count => (count < 1e6 ? `${Math.max(1, Math.round(count / 1000))} kB` : `${(count / 1e6).toFixed(1)} MB`);
const msOf = ms => (ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

// fusing

const OWN = { output: "fused", format: "png", colour: "natural", metadata: "drop", align: "rig" };
const isOverlay = () => !["natural", "grey"].includes(form.elements.colour.value);

// The options that differ from what the server takes by itself.
function chosenOptions() {
  const options = [];
  const names = [
    "output", "format", "steps", "sampler", "exposure", "rig", "colour", "colour_range", "values", "degrees",
    "align", "alarm", "outline", "metadata", "seed", "vis_range", "ir_range",
  ];
  for (const name of names) {
    let value = form.elements[name].value.trim();
    if (value === HAND) value = aligner.rig;
    if (name === "colour_range" && !isOverlay()) continue;
    if (name === "outline" && !form.elements.alarm.value.trim()) continue;
    if (value && value !== OWN[name]) options.push([name, value]);
  }
  return options;
}

async function fuse() {
  if (running) return;
  const missing = ROLES.find(role => !pair[role]);
  if (missing) {
    complain(new Problem({ title: "A picture is missing", detail: `Choose the ${INPUTS[missing].toLowerCase()} picture first.` }));
    $(missing).focus();
    return;
  }
  if (form.elements.rig.value === HAND && !aligner.rig) {
    complain(new Problem({ title: "Nothing is laid by hand", detail: "These files have no preview here; choose a rig, or none." }));
    form.elements.rig.focus();
    return;
  }
  complain(null);
  begin(ROLES);
  running = new AbortController();
  const started = performance.now();
  const timer = setInterval(() => {
    $("elapsed").textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`;
  }, 100);
  setBusy(true);
  const body = new FormData(), wanted = { output: form.elements.output.value, format: form.elements.format.value };
  for (const role of ROLES) body.append(role, pair[role].file, pair[role].file.name);
  for (const [name, value] of chosenOptions()) body.append(name, value);
  try {
    showPhase({ phase: "sending", share: 0 });
    await Promise.race([asked, aborted(running.signal)]);
    const answer = await client.fuse(body, { canRead, onPhase: showPhase, signal: running.signal });
    const tookMs = performance.now() - started;
    await showResult(answer, wanted, tookMs);
    say(`Fused in ${msOf(tookMs)}${answer.warnings.length ? ", with warnings" : ""}`);
    if (!isWide.matches) $("tools").scrollIntoView({ behavior: isCalm.matches ? "auto" : "smooth" });
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled");
    else {
      say("");
      complain(error);
    }
  } finally {
    clearInterval(timer);
    running = null;
    setBusy(false);
  }
}

// Never resolves; rejects when the signal says so.
const aborted = signal => new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason), { once: true }));

function showPhase({ phase, share, numQueued, attempts }) {
  $("bar").removeAttribute("value");
  if (phase === "sending") {
    $("bar").value = Math.round(100 * share);
    say("Sending");
  } else if (phase === "queued") {
    say(numQueued > 1 ? `In the queue, one of ${numQueued} that wait` : "In the queue");
  } else if (phase === "running") {
    say(attempts > 1 ? `With a worker, attempt ${attempts}` : "With a worker");
  } else {
    say("Fetching the pictures");
  }
}

// The live region: told only what is new, so that a screen reader is not read the clock.
function say(text) {
  if ($("phase").textContent !== text) $("phase").textContent = text;
}

function setBusy(isBusy) {
  const hadFocus = document.activeElement === $("cancel");
  form.setAttribute("aria-busy", isBusy);
  $("fuse").disabled = $("swap").disabled = isBusy;
  for (const control of form.querySelectorAll(".slot input, .samples button")) control.disabled = isBusy;
  $("cancel").hidden = !isBusy;
  $("bar").hidden = !isBusy;
  $("progress").hidden = !isBusy && !$("phase").textContent;
  $("elapsed").textContent = "";
  if (isBusy) $("cancel").focus({ preventScroll: true });
  else if (hadFocus) $("fuse").focus({ preventScroll: true });
}

function complain(problem) {
  $("problem").replaceChildren();
  if (!problem) return;
  make("strong", problem.title || "That did not work", $("problem"));
  make("p", problem.message, $("problem"));
  if (problem.requestId) make("small", `request ${problem.requestId}`, $("problem"));
  if (problem.status === 401) {
    askForKey();
    $("key").focus();
  }
  if (!(problem instanceof Problem)) console.error(problem);
}

// the server

function askForKey() {
  needsKey = true;
  $("key-section").hidden = false;
  $("key").setAttribute("aria-invalid", $("key").value !== "");
  showCommand();
}

async function showModel() {
  try {
    const [model] = await client.models();
    const rigs = await client.rigs(); // after it: who is not let in is told so once
    canRead = true;
    showRigs(rigs);
    $("model").textContent = model ? `${model.name} ${model.version}, on ${model.devices.join(", ")}` : "no worker is there";
    if (!model) return;
    form.elements.steps.placeholder = String(model.default_steps);
    $("own-sampler").textContent = `default (${model.default_sampler})`;
    $("own-exposure").textContent = `default (${model.default_exposure.replace("_", " ")})`;
    for (const option of form.elements.exposure.options)
      option.disabled = option.value !== "" && !model.exposures.includes(option.value);
  } catch (error) {
    $("model").textContent = "";
    if (error.status === 401) askForKey();
    else canRead = error.status !== 403;
  }
}

// The choice of rigs; what was chosen stays so.
function showRigs(rigs) {
  const select = form.elements.rig, chosen = select.value;
  select.replaceChildren(select.options[0], select.options[1]);
  for (const rig of rigs)
    select.append(new Option(`${rig.name}, covers ${Math.round(100 * rig.overlap)} %${rig.is_sure ? "" : ", unsure"}`, rig.name));
  select.value = chosen === HAND || rigs.some(rig => rig.name === chosen) ? chosen : "";
  aligner.rigs = rigs;
  showCommand();
}

// the command

function showCommand() {
  const { output: wanted, values, alarm } = form.elements;
  const isZip = wanted.value === "all" || values.value || alarm.value.trim();
  const output = isZip ? "recofuse.zip" : `${form.elements.output.value}.${form.elements.format.value}`;
  const [vis, ir] = ROLES.map(role => ({ name: pair[role]?.file.name ?? `${role}.png`, href: pair[role]?.href }));
  $("command").textContent = curlOf({
    vis, ir, output, needsKey, options: chosenOptions(), address: new URL("v1/fuse", document.baseURI).href,
  });
  $("copied").textContent = "";
}

async function copyCommand() {
  try {
    await navigator.clipboard.writeText($("command").textContent);
    $("copied").textContent = "Copied";
  } catch {  // beyond loopback the clipboard needs https
    getSelection().selectAllChildren($("command"));
    $("copied").textContent = "Selected; copy it with your keys";
  }
}

// wiring

const isWide = matchMedia("(min-width: 62rem)"), isCalm = matchMedia("(prefers-reduced-motion: reduce)");
$("options").open = isWide.matches;

for (const [name, label] of SAMPLES) {
  const button = make("button", "", document.querySelector(".samples"));
  button.type = "button";
  button.dataset.name = name;
  button.setAttribute("aria-pressed", "false");
  for (const role of ROLES) {
    const image = make("img", "", button);
    image.alt = "";
    image.src = `playground/samples/${name}-${role}.webp`;
  }
  make("span", label, button);
  button.addEventListener("click", () => chooseSample(name));
}
for (const role of ROLES)
  $(role).addEventListener("change", event => { if (event.target.files[0]) chooseFiles({ [role]: event.target.files[0] }); });
$("swap").addEventListener("click", () => { [pair.vis, pair.ir] = [pair.ir, pair.vis]; showPair(); });
form.addEventListener("submit", event => { event.preventDefault(); fuse(); });
form.addEventListener("input", () => {
  $("colour-range-field").hidden = !isOverlay();
  showCommand();
});
form.elements.rig.addEventListener("change", ({ target }) => {
  if (target.value === HAND) aligner.beginWith(namedRig);
  else namedRig = target.value;
  $("aligner").hidden = target.value !== HAND;
});
$("cancel").addEventListener("click", () => running?.abort());
addEventListener("pagehide", () => running?.abort());
$("key").addEventListener("input", event => { client.key = event.target.value.trim(); });
$("key").addEventListener("change", () => { asked = showModel(); });
for (const side of ["left", "right"])
  $(side).addEventListener("change", () => { sides = [$("left").value, $("right").value]; viewer.sides = sides; });
for (const radio of document.getElementsByName("layout"))
  radio.addEventListener("change", () => {
    viewer.layout = radio.value;
    for (const label of $("tools").querySelectorAll(".side")) label.hidden = radio.value === "panes";
  });
$("zoom-in").addEventListener("click", () => viewer.zoomIn());
$("zoom-out").addEventListener("click", () => viewer.zoomOut());
$("zoom-fit").addEventListener("click", () => viewer.fit());
$("copy").addEventListener("click", copyCommand);

let depth = 0;  // dragenter and dragleave come for every element on the way
const hasFiles = event => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", event => { if (hasFiles(event)) document.body.classList.toggle("dropping", ++depth > 0); });
addEventListener("dragleave", event => { if (hasFiles(event)) document.body.classList.toggle("dropping", --depth > 0); });
addEventListener("dragover", event => { if (hasFiles(event)) event.preventDefault(); });
addEventListener("drop", event => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("dropping");
  if (running || !event.dataTransfer.files.length) return;
  const files = [...event.dataTransfer.files];
  const slot = event.target.closest?.(".slot input")?.id;
  chooseFiles(files.length === 1 && slot ? { [slot]: files[0] } : assign(files));
});

showPair();
asked = showModel();
chooseSample(SAMPLES[0][0]);
