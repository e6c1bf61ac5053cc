// Talks to the server: the lists of models and rigs, and one fusion from upload to pictures. Addresses are relative to the page.

// What a problem document (RFC 9457) says, or what took its place.
export class Problem extends Error {
  constructor({ title = "", detail, status = 0, code = "", requestId = "" }) {
    super(detail);
    Object.assign(this, { title, status, code, requestId });
  }
}

export class Client {
  #key = "";

  // Kept here and nowhere else; empty: none is sent.
  set key(key) { this.#key = key; }

  get headers() { return this.#key ? { Authorization: `Bearer ${this.#key}` } : {}; }

  async models(signal) {
    const answer = await this.#fetch("v1/models", { signal });
    return (await answer.json()).models;
  }

  // The rigs that a fusion may name.
  async rigs(signal) {
    const answer = await this.#fetch("v1/rigs", { signal });
    return (await answer.json()).rigs;
  }

  // Fuses a pair and returns { blob, type, timing, model, irSource, warnings, isZip }. onPhase({ phase, ... }) is told
  // where it stands: sending { share }, queued { numQueued }, running { attempts }, fetching. canRead: false for a key
  // that may only submit, so that the answer is waited for on one connection. Throws Problem, or AbortError after signal.
  async fuse(form, { canRead, onPhase, signal }) {
    signal.throwIfAborted();
    const accepted = await this.#post(form, canRead, onPhase, signal);
    if (!canRead) return resultOf(accepted.blob, accepted.header);
    const job = JSON.parse(await accepted.blob.text());
    const cancel = () => this.cancel(job.id);
    signal.addEventListener("abort", cancel, { once: true });
    try {
      if (signal.aborted) cancel();  // while the answer was being read
      await this.#finished(job, onPhase, signal);
      onPhase({ phase: "fetching" });
      const answer = await this.#patiently(() => this.#fetch(`v1/jobs/${job.id}/result`, { signal }), signal);
      return resultOf(await answer.blob(), name => answer.headers.get(name));
    } finally {
      signal.removeEventListener("abort", cancel);
    }
  }

  // Nobody waits for this job any more. Also works while the page is being left.
  cancel(id) {
    fetch(`v1/jobs/${id}`, { method: "DELETE", headers: this.headers, keepalive: true }).catch(() => {});
  }

  // XMLHttpRequest, because fetch cannot tell how much of a body has been sent. Once all of it is, an asynchronous job
  // may have been accepted: only the answer names it, so that is waited for, and the job cancelled, behind the caller.
  #post(form, isAsync, onPhase, signal) {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open("POST", "v1/fuse");
      request.responseType = "blob";
      for (const [name, value] of Object.entries(this.headers)) request.setRequestHeader(name, value);
      if (isAsync) request.setRequestHeader("Prefer", "respond-async");
      request.upload.onprogress = event => onPhase({ phase: "sending", share: event.loaded / event.total });
      let isSent = false;
      request.upload.onload = () => {
        isSent = true;
        if (!isAsync) onPhase({ phase: "running", attempts: 1 });
      };
      request.onload = async () => {
        const header = name => request.getResponseHeader(name);
        if (request.status < 300 && isAsync && signal.aborted) this.cancel(JSON.parse(await request.response.text()).id);
        else if (request.status < 300) resolve({ blob: request.response, header });
        else reject(problemOf(request.status, await request.response.text(), header));
      };
      request.onerror = () => reject(unreachable());
      request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
      signal.addEventListener("abort", () => {
        if (isSent && isAsync) reject(signal.reason);
        else request.abort();
      }, { once: true });
      request.send(form);
    });
  }

  async #finished(job, onPhase, signal) {
    for (let pauseMs = 100; ; pauseMs = Math.min(pauseMs * 1.5, 1000)) {
      if (job.status === "succeeded") return;
      if (job.status === "queued") onPhase({ phase: "queued", numQueued: job.num_queued });
      else if (job.status === "running") onPhase({ phase: "running", attempts: job.attempts });
      else throw new Problem({ title: `The job ${job.status}`, detail: job.error?.message ?? "", code: job.error?.code });
      await pause(pauseMs, signal);
      const answer = await this.#patiently(() => this.#fetch(`v1/jobs/${job.id}`, { signal }), signal);
      job = await answer.json();
    }
  }

  // Repeats a read that met a lost connection or a server that asked for patience; the job itself goes on meanwhile.
  async #patiently(read, signal) {
    for (let tries = 1; ; tries++) {
      try {
        return await read();
      } catch (error) {
        if (!(error instanceof Problem) || ![0, 429, 502, 503].includes(error.status) || tries === 8) throw error;
        await pause(Math.min(250 * 2 ** tries, 4000), signal);
      }
    }
  }

  async #fetch(address, options) {
    let answer;
    try {
      answer = await fetch(address, { ...options, headers: this.headers });
    } catch (error) {
      throw error.name === "AbortError" ? error : unreachable();
    }
    if (!answer.ok) throw problemOf(answer.status, await answer.text(), name => answer.headers.get(name));
    return answer;
  }
}

function resultOf(blob, header) {
  const type = (header("Content-Type") ?? "").split(";")[0];
  return {
    blob,
    type,
    isZip: type === "application/zip",
    timing: timingOf(header("Server-Timing") ?? ""),
    model: [header("X-Model-Name"), header("X-Model-Version")].filter(Boolean).map(decodeURIComponent).join(" "),
    irSource: header("X-Infrared-Source") ?? "",
    alignment: header("X-Alignment") ?? "",
    warnings: (header("X-Warning") ?? "").split(/, */).filter(Boolean).map(decodeURIComponent),  // lines come joined
  };
}

// "decode;dur=1.25, model;dur=300" to [["decode", 1.25], ["model", 300]]; milliseconds.
export function timingOf(text) {
  return [...text.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, stage, ms]) => [stage, Number(ms)]);
}

function problemOf(status, text, header) {
  try {
    const { title, detail, code, request_id: requestId } = JSON.parse(text);
    return new Problem({ title, detail: detail + patienceOf(header("Retry-After")), status, code, requestId });
  } catch {  // not ours: a proxy's own page
    return new Problem({ title: "The request failed", detail: `The server answered ${status}.`, status });
  }
}

const patienceOf = seconds => (seconds ? ` (try again in ${seconds} s)` : "");

const unreachable = () => new Problem({ title: "No connection", detail: "The server cannot be reached." });

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => { clearTimeout(timer); reject(new DOMException("cancelled", "AbortError")); };
    const timer = setTimeout(() => { signal.removeEventListener("abort", stop); resolve(); }, ms);
    if (signal.aborted) stop();
    else signal.addEventListener("abort", stop, { once: true });
  });
}
