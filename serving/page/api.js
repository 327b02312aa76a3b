// Requests to the server. The key stays in this tab and travels in a header, never in an address.

const KEY = "openvla-key";
const ASKED = "This server asks for a key. It stays in this tab.";
const PATIENCE = 5000; // milliseconds for what repeats by itself: a network that has gone says nothing for minutes
let asking = null; // the dialog that is open: all requests wait for the same one
let model = null; // of which the page knows names and units: that of the first answer

// Answers of the routes under page/; an Error in words for people if there is none.
// quiet: of requests that repeat by themselves, which do not ask for the key.
export async function call(path, { quiet = false, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      const signal = quiet ? AbortSignal.timeout?.(PATIENCE) : options.signal; // browsers before 2022 have none
      response = await fetch(`page/${path}`, { ...options, signal, headers, cache: "no-store" });
    } catch {
      throw new Error("The server does not answer.");
    }
    if (response.ok) return response;
    if (response.status !== 401 || quiet) throw new Error(await wordsOf(response));
    // Meanwhile another request may have been given one.
    if (key === sessionStorage.getItem(KEY)) await askForKey(key ? "That key is not the server's." : ASKED);
  }
}

export async function json(path, options) {
  const found = await (await call(path, options)).json();
  model ??= found.digest;
  if (found.digest !== model) throw new Error("The server was started again with another model: reload this page.");
  return found;
}

export function post(path, content) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) };
  return json(path, options);
}

async function wordsOf(response) {
  try {
    const { error, detail } = await response.json();
    return String(error ?? (Array.isArray(detail) ? detail.map((entry) => entry.msg).join("; ") : detail));
  } catch {
    return `The server answers ${response.status} ${response.statusText}.`;
  }
}

function askForKey(words) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key-field");
    document.getElementById("key-words").textContent = words;
    field.value = "";
    dialog.returnValue = "";
    dialog.onclose = () => {
      asking = null;
      const key = field.value.trim();
      field.value = "";
      if (dialog.returnValue !== "given") return reject(new Error("Without the key there is no answer: reload the page to give it."));
      if (!/^[\x20-\x7e]+$/.test(key)) return reject(new Error("A key is not empty and has no letters beyond ASCII."));
      sessionStorage.setItem(KEY, key);
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}
