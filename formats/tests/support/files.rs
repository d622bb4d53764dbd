//! The files of an image: one, or a second one that has the payload. Each is flushed by itself and
//! loses what it likes when the power goes.
use super::disk::Disk;
use super::random::Random;
use super::written::DATA_FILE_NAME;
use std::path::Path;
use std::sync::Arc;

#[derive(Clone)]
pub struct Files {
    pub image: Arc<Disk>,
    /// The external data file.
    data: Option<Arc<Disk>>,
}

impl Files {
    pub fn new(image: Disk, data: Option<Disk>) -> Self {
        Self { image: Arc::new(image), data: data.map(Arc::new) }
    }

    /// Where the payload is.
    pub fn payload(&self) -> &Disk {
        self.data.as_ref().unwrap_or(&self.image)
    }

    pub fn is_external(&self) -> bool {
        self.data.is_some()
    }

    /// What is there now, flushed or not.
    pub fn copy(&self) -> Self {
        Self::new(self.image.copy(), self.data.as_ref().map(|data| data.copy()))
    }

    /// What is there after a power cut now.
    pub fn after_power_cut(&self, random: &mut Random) -> Self {
        let image = self.image.after_power_cut(random);
        Self::new(image, self.data.as_ref().map(|data| data.after_power_cut(random)))
    }

    /// As files of the system: the image as `name`, the external data file as the image names it.
    pub fn write_to(&self, folder: &Path, name: &str) {
        for (disk, name) in [(Some(&self.image), name), (self.data.as_ref(), DATA_FILE_NAME)] {
            if let Some(disk) = disk {
                std::fs::write(folder.join(name), disk.to_vec()).expect("room");
            }
        }
    }
}
