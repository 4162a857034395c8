// The server's addresses: OpenAI's chat API, as events, and what is beside it.

const KEY = "phisight-key";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function ask(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? { headers, signal } : {
    method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?", 0);
  }
  if (!response.ok) throw new ServerError(await toldBy(response), response.status);
  return response;
}

async function toldBy(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

/** The first model's document; a ServerError with status 401 where a key is wanted. */
export async function model() {
  return (await (await ask("v1/models")).json()).data[0];
}

/** What a picture of that many pixels costs with at most so many patches (null: no limit): tokens, seconds or null. */
export async function imageCost(width, height, patches) {
  return (await ask("v1/images/cost", { width, height, max_patches: patches })).json();
}

/** The events of an answer, one document each. Aborting the signal closes the connection, which stops the server. */
export async function* answer(body, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", whole, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let done = false;
  while (!done) {
    const piece = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server broke.", 0);
    });
    if (piece.done) throw new ServerError("The connection ended before the answer did.", 0);
    const events = (held + piece.value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment that keeps the connection alive
      if (event === "data: [DONE]") {
        done = true;
        break;
      }
      const document = JSON.parse(event.slice(6));
      if (document.error) throw new ServerError(document.error.message, 200);
      yield document;
    }
  }
}
