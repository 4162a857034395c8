// Conversations in this browser (IndexedDB). Tabs tell each other what changed.

const channel = new BroadcastChannel("phisight");
let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("phisight", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function transact(mode, work) {
  const transaction = (await database()).transaction("conversations", mode);
  const result = work(transaction.objectStore("conversations"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(result.result ?? result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** A conversation without turns; it is kept once it has one. */
export function fresh() {
  const id = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`; // the former needs https or this machine
  return { id, revision: 0, changed: 0, title: "", turns: [] };
}

/** Every conversation, the newest first. */
export async function all() {
  const found = await transact("readonly", (store) => store.getAll());
  return found.sort((a, b) => b.changed - a.changed);
}

/** Keep a conversation. Where another tab has gone on with it meanwhile, this one becomes a copy beside it. */
export async function keep(conversation) {
  await transact("readwrite", (store) => {
    const stored = store.get(conversation.id);
    stored.onsuccess = () => {
      if (stored.result && stored.result.revision !== conversation.revision) conversation.id = fresh().id;
      conversation.revision += 1;
      conversation.changed = Date.now();
      store.put(conversation);
    };
    return stored;
  });
  channel.postMessage(conversation.id);
}

export async function remove(id) {
  await transact("readwrite", (store) => store.delete(id));
  channel.postMessage(id);
}

export async function removeAll() {
  await transact("readwrite", (store) => store.clear());
  channel.postMessage(null);
}

/** Call back when another tab has changed something. */
export function onOtherTab(changed) {
  channel.addEventListener("message", () => changed());
}
