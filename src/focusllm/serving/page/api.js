// The server, by the routes that any client may use. What goes wrong is an ApiError with a sentence for people.

const KEY = "focusllm-key";
let needKey = () => {};

export class ApiError extends Error {
  /** `code`: the server's word for programs. */
  constructor(message, status = 0, code = "") {
    super(message);
    Object.assign(this, { status, code });
  }
}

/** What is done when the server asks for a key. */
export function onKeyNeeded(callback) {
  needKey = callback;
}

/** Send a key along from now on, until the tab is closed. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

function authorization() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function unreachable() {
  return new ApiError("The server cannot be reached; is it still running?");
}

function refusal(status, text) {
  let error = { message: `The server refused this (status ${status}).` };
  try {
    error = JSON.parse(text).error;
  } catch {
    // something before the server answered
  }
  if (status === 401) needKey(error.message);
  return new ApiError(error.message, status, error.code);
}

async function send(path, options = {}) {
  let response;
  try {
    response = await fetch(`v1/${path}`, { ...options, headers: { ...authorization(), ...options.headers } });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

function post(path, body, signal) {
  return send(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

export async function get(path) {
  return (await send(path)).json();
}

export async function create(path, body) {
  return (await post(path, body)).json();
}

export async function remove(path) {
  return (await send(path, { method: "DELETE" })).json();
}

/** All that a path lists, page after page. */
export async function all(path) {
  const found = [];
  let after = "";
  for (;;) {
    const page = await get(`${path}?limit=100${after}`);
    found.push(...page.data);
    if (!page.has_more) return found;
    after = `&after=${encodeURIComponent(page.last_id)}`;
  }
}

/** A file, sent; `onProgress` is told the share that is there. Only XMLHttpRequest tells how far an upload is. */
export function upload(file, name, onProgress) {
  const form = new FormData();
  form.append("purpose", "assistants");
  form.append("file", file, name);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "v1/files");
    for (const [header, value] of Object.entries(authorization())) request.setRequestHeader(header, value);
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onerror = () =>
      reject(new ApiError("It could not be sent; the server is gone, or takes no file as large as this."));
    request.onload = () =>
      request.status < 300
        ? resolve(JSON.parse(request.responseText))
        : reject(refusal(request.status, request.responseText));
    request.send(form);
  });
}

/** The events of an answer, as they come. */
export async function* chat(body, signal) {
  const response = await post("chat/completions", { ...body, stream: true, return_progress: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : unreachable();
    });
    if (done) throw new ApiError("The server ended the answer before it was complete; ask again.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a sign of life
      if (event === "data: [DONE]") return;
      const data = JSON.parse(event.slice("data: ".length));
      if (data.error) throw new ApiError(data.error.message);
      yield data;
    }
  }
}
